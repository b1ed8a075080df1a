"""Many devices and many processes: how a run finds them, splits its work over them, and ends with them.

- ``mesh``: the devices of all processes as one mesh; how arrays are split over it; the memory that is free on them.
- ``collectives``: what all processes do together, such as to gather an array or to agree to stop.
- ``cluster``: which processes make up a run, and which GPUs of its node each one has.
- ``gpus``: the GPUs of a node, and those that a process sees.
- ``processes``: barriers and broadcasts without devices; which process has failed; this one's part of a unit's items.

``processes`` and ``gpus`` import no JAX.
"""
