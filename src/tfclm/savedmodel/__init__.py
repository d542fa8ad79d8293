"""What goes into the exported graph, and how a finished version is validated and published."""
