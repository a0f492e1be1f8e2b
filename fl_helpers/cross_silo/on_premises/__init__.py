"""A real cross-silo run on your own machines, with NVFlare 2.9.0 underneath.

Read in this order: `provision` (who takes part, certificates, start-up kits), `site`
(what a hospital enforces), `gate` (what it lets out), `guards` (nothing passes between
hospitals), `executor` (trains at the hospital), `refusals` (why it says no),
`controller` (runs the rounds at the coordinator), `record` (what is kept of them),
`runs` (starts a run and listens), `fleet` (all of it on one machine).
Copy the folder together with the files beside it.
"""
