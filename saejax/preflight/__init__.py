"""What will run, whether it fits, and roughly how long it takes, before hours are spent.

- ``shapes``: which models, from their ``config.json`` alone;
- ``work``: the sizes of what the stages run for a model;
- ``memory``, ``advice``: bytes per device on a mesh, and what to change where they do not fit;
- ``costs``, ``times``: floating-point operations, seconds, disk;
- ``programs``, ``topology``: the stages' own jitted functions, compiled for a TPU slice that need not be there;
- ``parity``: the decoder against transformers;
- ``checks``: the stage; ``place``: its devices; ``tables``: what it prints.
"""
