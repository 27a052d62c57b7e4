"""The demos, on handwritten digits and on pictures with sentences, and the judges of their samples."""
