"""Times of a transformer's steps, and the commands `bench transformer` and `bench memory`.

measure.py times steps in new processes, record.py has the lines of the run, views.py its tables and its picture.
"""
