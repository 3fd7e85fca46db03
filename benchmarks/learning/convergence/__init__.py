"""Modules of benchmarks/learning/bench_convergence.py.

corpus       text to tokens
contenders   the optimizers and their first learning rates
peers        optimizers of other papers that Optax does not have
training     one run: a model, an optimizer, a learning rate, a seed
search       chooses the next run
results      tables and pictures of all runs
"""
