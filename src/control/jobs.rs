//! Routes on jobs: list, show, cancel.

use axum::Json;
use axum::extract::State;

use super::wire::{Job, Work, WorkKind, WorkState, rfc3339_millis};
use super::{Answer, Control, Name, blocking};
use crate::bases::BaseJob;
use crate::disks::{DiskJob, DiskJobs};
use crate::jobs::{self, Progress, What};

impl From<What> for WorkKind {
    fn from(what: What) -> Self {
        match what {
            What::Hydrate => Self::Hydrate,
            What::Verify => Self::Verify,
            What::Flatten => Self::Flatten,
            What::Rebase => Self::Rebase,
            What::Compact => Self::Compact,
            What::Move => Self::Move,
        }
    }
}

impl From<jobs::State> for WorkState {
    fn from(state: jobs::State) -> Self {
        match state {
            jobs::State::Fetching => Self::Fetching,
            jobs::State::Waiting => Self::Waiting,
            jobs::State::Verifying => Self::Verifying,
            jobs::State::Copying => Self::Copying,
            jobs::State::Done => Self::Done,
            jobs::State::Failed => Self::Failed,
            jobs::State::Cancelled => Self::Cancelled,
        }
    }
}

impl Work {
    /// The work on the base of this name.
    pub(super) fn on(base: &str, progress: Progress) -> Self {
        let Progress { what, state, bytes, total, rate, digest_matches, error, .. } = progress;
        let job = crate::bases::jobs::id(what, base);
        Self { job, what: what.into(), state: state.into(), bytes, total, rate, digest_matches, error }
    }
}

impl From<BaseJob> for Job {
    fn from(BaseJob { base, progress }: BaseJob) -> Self {
        Self { base: base.clone(), ..Self::of(crate::bases::jobs::id(progress.what, &base), progress) }
    }
}

impl From<DiskJob> for Job {
    fn from(job: DiskJob) -> Self {
        let id = job.id();
        Self { disk: Some(job.disk), ..Self::of(id, job.progress) }
    }
}

impl Job {
    fn of(id: String, progress: Progress) -> Self {
        let Progress { what, state, bytes, total, rate, digest_matches, error, began, ended, resumed } =
            progress;
        let is_under_way = ended.is_none() && rate > 0;
        Self {
            id,
            kind: what.into(),
            base: String::new(),
            disk: None,
            state: state.into(),
            bytes,
            total,
            percent: percent(bytes, total),
            rate,
            seconds_left: is_under_way.then(|| total.saturating_sub(bytes).div_ceil(rate)),
            digest_matches,
            error,
            began: rfc3339_millis(began),
            ended: ended.map(rfc3339_millis),
            resumed,
        }
    }
}

/// With one decimal, rounded down, so that 100 means all.
pub(super) fn percent(bytes: u64, total: u64) -> f64 {
    if total == 0 {
        return 100.0;
    }
    (bytes.min(total) as f64 * 1000.0 / total as f64).floor() / 10.0
}

/// List the jobs
///
/// The jobs of this worker, and those of earlier workers that it continues: of each base and each disk the last job of
/// each kind.
/// And the exports and imports that clients do and have announced.
#[utoipa::path(
    get,
    path = "/v1/jobs",
    tag = "jobs",
    operation_id = "list_jobs",
    responses((status = 200, description = "Jobs in the order in which they began.", body = Vec<Job>))
)]
pub(super) async fn list(State(c): State<Control>) -> Answer<Vec<Job>> {
    blocking(move || {
        let mut jobs: Vec<Job> = c.bases.jobs().into_iter().map(Job::from).collect();
        jobs.extend(c.clients.list());
        jobs.extend(c.disk_jobs.jobs().into_iter().map(Job::from));
        jobs.sort_by(|one, other| one.began.cmp(&other.began));
        Ok(jobs)
    })
    .await
}

/// Show a job
#[utoipa::path(
    get,
    path = "/v1/jobs/{id}",
    tag = "jobs",
    operation_id = "show_job",
    responses((status = 200, description = "The job.", body = Job))
)]
pub(super) async fn show(State(c): State<Control>, Name(id): Name) -> Answer<Job> {
    if let Some(job) = c.client_job(&id) {
        return Ok(Json(job));
    }
    blocking(move || match DiskJobs::is_of_disk(&id) {
        true => Ok(c.disk_jobs.job(&id)?.into()),
        false => Ok(c.bases.job(&id)?.into()),
    })
    .await
}

/// Cancel a job
///
/// The answer comes when the job has ended. A job that had ended before is not changed. No later worker continues a
/// cancelled hydration. What it has fetched stays in the cache like what readers fetched; the copy of a file of this
/// host is dropped. A base that was hydrated before the job began stays hydrated. What a job on a disk has copied is
/// dropped, and the disk is as it was. The client of an export or import is told; the answer does not wait for it
/// longer than 5 seconds.
#[utoipa::path(
    post,
    path = "/v1/jobs/{id}/cancel",
    tag = "jobs",
    operation_id = "cancel_job",
    responses((status = 200, description = "The job.", body = Job))
)]
pub(super) async fn cancel(State(c): State<Control>, Name(id): Name) -> Answer<Job> {
    if let Some(job) = c.cancel_client_job(&id).await {
        return Ok(Json(job));
    }
    blocking(move || match DiskJobs::is_of_disk(&id) {
        true => Ok(c.disk_jobs.cancel(&id)?.into()),
        false => Ok(c.bases.cancel_job(&id)?.into()),
    })
    .await
}
