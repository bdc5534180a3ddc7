"""What the tutorials share: data sets, figures, and the record of a longer run.

`hbp.tutorial.datasets` and `hbp.tutorial.plotting` need the packages of
`pip install "hbp[tutorials]"`. Nothing else in `hbp` imports them.
"""
