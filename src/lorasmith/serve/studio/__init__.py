"""The studio: a page to ask, look at data, train, and compare runs, on the server and nowhere else.

    page.py       the four tabs as one page, mounted beside the API; styles, keys, what may be requested
    chat.py       base and adapters side by side
    data.py       a file -> receipt, statistics, examples with what is learnt marked
    train.py      a form made from the settings classes (form.py), a run watched while it learns (progress.py)
    runs.py       all runs: table, curves, report, merge, download
    places.py     the two folders that names in the page point into
    jobs.py       training, merging and reporting as processes of their own, found again by their folder

It asks through the server's ``Service`` and trains through the command line, so nothing here computes.
"""
