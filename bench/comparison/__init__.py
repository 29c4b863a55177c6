"""What this package and its peers can and cannot do, checked by code where the peer is installed.

`rows.py` has the questions. `checks.py` and `models.py` say what a package has to do for a yes, `peers.py` how each
package is called. `tables.py` writes the tables. `python -m bench.comparison` runs the checks and writes a result file.
"""
