"""Does it learn better? The parts of `benchmarks/learning/bench_convergence.py`.

corpus       text to tokens
contenders   the optimizers, each with where its learning rate is looked for
training     one run: a model, an optimizer, a learning rate, a seed
search       which run comes next
results      what runs say together: a table, and pictures
"""
