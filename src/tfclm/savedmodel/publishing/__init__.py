"""Publishing a finished version: gate, canary and version numbers, local or remote."""
