//! The jobs on bases: which there are, and how an operator cancels one.
//!
//! What must hold: a hydration that was cancelled stays cancelled. So the base's record says that the base is not to be
//! hydrated before the job ends, and the next worker does not continue it.

use std::sync::Arc;

use super::Bases;
use super::copies::dropping;
use super::hydrate::{Progress, What};
use crate::fetch::kept::SharedCopies;
use crate::store::{BaseNode, StoreError};

/// What cancels a job, as the job reports it.
const CANCELLED: &str = "an operator cancelled it";

/// A job and its base.
#[derive(Clone, Debug)]
pub struct BaseJob {
    /// Name of the base.
    pub base: String,
    /// Its progress.
    pub progress: Progress,
}

/// The identifier of a job: its kind and its base, such as `hydrate-debian`.
pub fn id(what: What, base: &str) -> String {
    format!("{}-{base}", what.name())
}

/// The kind and the base of an identifier.
fn parse(id: &str) -> Option<(What, &str)> {
    let (kind, base) = id.split_once('-')?;
    Some((What::ON_BASES.into_iter().find(|what| what.name() == kind)?, base))
}

fn no_job(id: &str) -> StoreError {
    StoreError::NotFound { object: format!("job {id}"), noun: "job" }
}

impl Bases {
    /// All jobs of this worker, and those that it is to continue: of each base the last one of each kind, in the order
    /// in which they began.
    pub fn jobs(&self) -> Vec<BaseJob> {
        let of = |node: &Arc<BaseNode>| {
            What::ON_BASES.map(|what| {
                let progress = self.hydrations.progress_of(node, what)?;
                Some(BaseJob { base: node.record().name.clone(), progress })
            })
        };
        let mut jobs: Vec<_> = self.store.bases().iter().flat_map(of).flatten().collect();
        jobs.sort_by_key(|job| job.progress.began);
        jobs
    }

    /// The job of this identifier.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn job(&self, id: &str) -> Result<BaseJob, StoreError> {
        let (node, what) = self.job_of(id)?;
        let progress = self.hydrations.progress_of(&node, what).ok_or_else(|| no_job(id))?;
        Ok(BaseJob { base: node.record().name.clone(), progress })
    }

    fn job_of(&self, id: &str) -> Result<(Arc<BaseNode>, What), StoreError> {
        let (what, base) = parse(id).ok_or_else(|| no_job(id))?;
        let node = self.store.base(base).map_err(|error| match error {
            StoreError::NotFound { .. } => no_job(id),
            error => error,
        })?;
        Ok((node, what))
    }

    /// Cancels a job and waits for its end. A job that has ended is not changed. What a hydration has fetched stays in
    /// the cache like what readers fetched; the copy of a file of this host is dropped, because the base is read from
    /// the file again. A base that was hydrated before the job began stays hydrated.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` when the copy of a file may be the last one; errors of the storage when it writes the
    /// record.
    pub fn cancel_job(&self, id: &str) -> Result<BaseJob, StoreError> {
        let (base, what) = self.job_of(id)?;
        let progress = self.hydrations.progress_of(&base, what).ok_or_else(|| no_job(id))?;
        if progress.has_ended() {
            return self.job(id);
        }
        if what == What::Verify || self.hydrations.repeats(base.id()) {
            self.hydrations.cancel(base.id(), CANCELLED);
            return self.job(id);
        }
        let local: Vec<_> = base.record().files().filter(|file| file.is_local()).collect();
        for file in &local {
            self.sources.original_of(file).map_err(|source| {
                let why = format!(
                    "the job goes on, because the copy in the store may be the last one of {} ({source}); put the file \
                     back, or end the job and drop the copy with `plyfs base evict {} --force`",
                    file.source,
                    base.record().name
                );
                StoreError::invalid(format!("job {id}"), why)
            })?;
        }
        // The record changes first: after a crash from here on, the next worker does not continue (D73).
        let options = base.set_options(|options| options.hydrate = false)?;
        self.hydrations.cancel(base.id(), CANCELLED);
        let cancelled = self.job(id);
        let others = self.others(&base);
        for file in base.record().files() {
            if self.sources.shares(base.record(), file, &others) == SharedCopies::Drop {
                self.sources.contents(base.record(), file).pin(options.pinned);
            }
        }
        let ((), noted) = dropping(&self.store, &self.sources, std::slice::from_ref(&base), || {
            for file in local {
                self.sources.evict(base.record(), file, &others);
            }
        });
        noted?;
        base.detach();
        if base.options().hydrate {
            // Another request began a hydration meanwhile, and found the job that ends here.
            self.hydrations.begin_again(&base)?;
        }
        cancelled.or_else(|_| {
            // It was not begun yet, so there is nothing to show.
            let mut progress = progress;
            progress.cancel(CANCELLED);
            Ok(BaseJob { base: base.record().name.clone(), progress })
        })
    }
}
