"""One run on N processes: a job, a base model and tokenised rows -> an adapter, exactly resumable."""
