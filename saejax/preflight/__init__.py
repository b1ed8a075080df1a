"""What will run, whether it fits, and roughly how long it takes, before hours are spent.

What a unit takes is said by its stage, in a function beside its code (``Stage.cost``). Here the configuration becomes a
plan, the stages' costs are asked for and added up, and there is a verdict:

- ``shapes``: which models, from their ``config.json`` alone; ``place``: on which devices;
- ``sums``: the plan of a model, the costs of all units on it, and their sums;
- ``advice``: what to change where they do not fit;
- ``rates``: how fast this machine is;
- ``topology``: the stages' own jitted functions, compiled for a TPU slice that need not be there;
- ``parity``: the decoder against transformers;
- ``checks``: the stage; ``tables``: what it prints.
"""
