"""What a step of hbp costs, beside the steps of others.

``make bench`` runs everything here and writes ``docs/assets/benchmarks/cpu.json``,
or ``cuda.json``; ``tools/draw_benchmarks.py`` turns those into figures and tables.

| file | subject |
|---|---|
| ``points.py`` | the network, the batch, and the weights at which a step is timed |
| ``steps.py`` | the contenders: first-order methods, hbp, plain autograd |
| ``peers.py`` | the contenders that BackPACK and curvlinops provide |
| ``measure.py`` | timing in alternation, and where and when the numbers were made |
| ``work.py`` | arithmetic and memory traffic, counted from the shapes |
| ``table.py`` | every contender's step, as a multiple of SGD's |
| ``growth.py`` | cost against width, depth, batch size and number of classes |
| ``stages.py`` | the stages of hbp's step next to what the machine can do |
| ``memory.py`` | the peak memory of each step |
| ``__main__.py`` | runs all of it |
"""
