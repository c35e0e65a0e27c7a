"""How the zeros of one weight are left out on disk: one module per format, found through `registry`."""
