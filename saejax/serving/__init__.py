"""``saejax serve``: a folder's attribution graphs as living pages, on this machine alone.

run      the binary                               guard    who may ask: a token, this host, this origin
app      the addresses and the pages              jobs     work in threads, told line by line, stopped with its request
store    graphs, labels and groups of a folder    session  the model and the prompts in memory, new prompts
effects  the model with features changed
"""
