"""PythonMath: word problems, with Python."""
