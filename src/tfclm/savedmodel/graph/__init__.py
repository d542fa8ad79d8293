"""What an exported SavedModel holds: signatures, decoding with a key-value cache, sampling, stop strings, scoring."""
