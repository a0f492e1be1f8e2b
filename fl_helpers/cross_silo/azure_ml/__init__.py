"""A real cross-silo run on Azure ML: each round, jobs scatter to the silos and gather.

Read in this order: `federation` (who takes part, what belongs to whom), `pipeline` (the
graph of jobs), `jobs/` (what runs in them), `plan` (flows of data that are allowed; all
others are refused), `explain` (the plan as a table, a text to sign, a picture),
`run_locally` (the same plan on this machine, in sandboxes), `client` (sign in, send,
wait, download), with `preflight` (is everything there?) and `problems` (errors in plain
words), `rounds` (a graph for each round: quorum, stop, resume). Copy the folder
together with the files beside it.
"""
