"""What ``mm-datafmt check`` looks at beyond a record's own rules.

:mod:`.headers` and :mod:`.pictures` look at image files, :mod:`.duplicates` remembers records, :mod:`.lengths` counts
tokens with the counters of :mod:`.text_tokens`; :mod:`.examiner` does all that to a file's records and gives
:mod:`.result`, which :mod:`.histogram` and :mod:`.html_report` show.
"""
