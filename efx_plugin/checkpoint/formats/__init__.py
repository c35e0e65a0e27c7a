"""How the zeros of one weight are left out on disk: `protocol` says what a format is, `registry` lists them.

`pack_quantized` stands apart: it leaves out no zeros, so that it is no sparse format and not in the registry.
"""
