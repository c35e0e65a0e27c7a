"""What `efx compare` runs: pipelines side by side on one model, one adapter and one domain, and what they are worth.

A cell is one pipeline on one set of inputs. `grid` runs cells in processes of their own and keeps what they found;
`report` makes rows and a table of it. Importing this package costs nothing: torch comes in with a cell's process.
"""
