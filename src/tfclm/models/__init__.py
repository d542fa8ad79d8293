"""The decoder of many model types in TensorFlow: what it computes (`spec`, `families`), and how (`decoder`)."""
