"""The paper's table: its columns, the runs that fill it, what is made of them.

A column is added in columns.py, what others published of it in published.py.
"""
