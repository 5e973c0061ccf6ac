"""A small sweep from a notebook: run it cell by cell, or as a script.

It searches four configurations of a 22 M encoder on film-review snippets, in about a minute.
"""

# %% Load a job, and change some of its fields
import lorafleet

job = lorafleet.load_job(
    "examples/quickstart.yaml",
    {"search.num_samples": 4, "search.scheduler.max_t": 600, "search.scheduler.grace_period": 300},
)
job.job.search.parameters

# %% Look at everything that would happen, before it happens
plan = lorafleet.plan(job)
for trial in plan.trials:
    print(trial.trial_id, trial.assignment, trial.steps)


# %% Run it, and look at the best trial so far while it runs
def show(report: lorafleet.Report) -> None:
    """Print the best trial so far."""
    scored = [row for row in report.trials if report.metric in row.metrics]
    if scored:
        print(f"{len(scored)} trials scored, best {scored[0].metrics[report.metric]:.3f}")


report = lorafleet.run_here(job, on_update=show)

# %% The decision, and the table as data
print(report.recommendation.sentence)
rows = [
    {"trial": row.trial_id, **row.params, **row.metrics, "seconds": row.train_seconds}
    for row in report.trials
]
print(rows[0])

# %% A run is found again at any time, by its name
run = lorafleet.find_run("quickstart")
print(run.id, run.status().state, run.path)
