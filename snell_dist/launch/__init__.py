"""From a configuration and what a machine or an allocation offers to a script that starts it, for anyone to read."""
