"The peers of the epoch benchmark, each a script that uses its library as that library's documentation says."
