"""The core: what curvature is, how it passes through a layer, how a step is solved for.

Read it in this order: operators, jacobians, module, layers, containers, losses, cg,
newton. It imports nothing of hbp outside itself; everything else joins it through four
hooks, see the page *How the code is laid out*.
"""
