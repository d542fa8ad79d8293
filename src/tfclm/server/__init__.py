"""The embedded model server: TensorFlow Serving's REST and gRPC contract on the TensorFlow that is installed anyway."""
