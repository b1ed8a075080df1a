"""``saejax-serve``: a folder's attribution graphs as living pages, on this machine alone.

run      the binary                               guard    who may ask: a token, this host, this origin
app      the addresses                            jobs     work in threads, told line by line, stopped with its request
store    graphs, labels and groups of a folder    session    the model and the prompts that are in memory
tracing  new prompts, as ``experiments.attribute``          effects  the model with features changed
"""
