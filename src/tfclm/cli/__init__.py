"""The command line: settings as flags and YAML, running a command, and what several commands do."""
