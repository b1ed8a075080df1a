"""Workdirs in buckets of Amazon's S3 or Google's Cloud Storage.

``mirror`` copies files there and back, ``lease`` is the lock that holds there, ``bucket`` has the objects.
"""
