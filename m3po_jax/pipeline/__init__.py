"""The stages of a run as functions over a run directory; the command line is a thin shell over them."""
