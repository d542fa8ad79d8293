"""The embedded model server: TensorFlow Serving's REST and gRPC APIs on the installed TensorFlow."""
