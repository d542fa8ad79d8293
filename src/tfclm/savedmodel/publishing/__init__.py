"""From a finished version to one that is served: gate, canary, version directories, local and remote."""
