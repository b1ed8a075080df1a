"""Checks before a run: does it fit, and roughly how long does it take?

The stages' own jitted functions (``Stage.programs``) are compiled with shapes in place of arrays, for the devices at
hand or for others that need not be there; the compiler says how much memory each takes.

- ``shapes``: models, known by their ``config.json`` alone; ``place``: the devices;
- ``plan``: a configuration on a model, its programs, the bytes and hours that it takes;
- ``topology``: compiling for TPU slices and nodes of GPUs; ``collectives``: what a program makes devices send;
- ``rates``: the speed of this machine, measured;
- ``parity``: the decoder against transformers;
- ``checks``: the stage.
"""
