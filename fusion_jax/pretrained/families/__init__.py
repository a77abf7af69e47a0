"""Published model families: config.json -> our module, and published tensor names <-> our params.

Each file has `build(config)`, the module; `inputs(config)`, what shapes its params; and
`slots(config)`, where each published tensor goes.
"""
