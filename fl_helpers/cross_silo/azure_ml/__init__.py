"""A real cross-silo run on Azure ML: each round, jobs scatter to the silos and gather.

Read in this order: `plan` (jobs, and the folders that they read and write), `pipeline`
(the one plan of a run), `snapshot` and `jobs/` (the code that runs in them), `start`
(each job looks at its code first), `explain` (the plan as a table, a text to sign, a
picture), `run_locally` (the plan on this machine, in sandboxes), `sdk` (the plan as
Azure's own objects), `wire` (what is sent equals the plan), `workspace` (sign in, send,
wait, download), with `preflight` (is everything there?) and `problems` (errors in plain
words), `rounds` (a graph for each round: quorum, stop, resume). Copy the folder
together with the files beside it.
"""
