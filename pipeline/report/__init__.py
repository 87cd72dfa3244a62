"""One page that tells a run: a single HTML file, without a network, for people who were not there.

write_report(path, data)      # page: what is in ReportData, nothing else
report_run(store, ...)        # run: the same, gathered from a run's folder in the store
"""
