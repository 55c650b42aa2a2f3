"""Text-only decoders: the language model alone, e.g. as a judge or for text-only preference data."""
