"""Many devices and many processes: how a run finds them, splits its work over them, and ends with them.

- ``mesh``: the devices of all processes as one mesh; how arrays are split over it; the memory that is free on them.
- ``collectives``: what all processes do together, such as to gather an array or to agree to stop.
- ``cluster``: which processes make up a run, and which GPUs of its node each one has.
- ``teams``: how the units and items of a stage are dealt out to processes.
- ``peers``: what processes tell one another without their devices: where they are, which item is the next.
- ``parent``: the process that starts another one for the work, and ends it when one elsewhere has ended.
- ``watchdog``: the stacks of a process that gets nowhere.

``teams``, ``peers``, ``parent`` and ``watchdog`` import no JAX, and ``cluster`` does when it joins processes.
"""
