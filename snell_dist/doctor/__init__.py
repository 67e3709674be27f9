"""Is it right here: the same numbers under every engine (parity), and what of this machine will hurt (env)."""
