//! Jobs that clients do themselves: `plyfs disk export` and `plyfs disk import` copy bytes through the mount.
//!
//! A client announces its job, says how far it is, and *holds* it: with a request that is answered when the job is
//! cancelled. What must hold:
//! - A job is listed as long as its client holds it, and a little longer, so that a connection may break. The kernel closes
//!   the connection of a client that was killed, and not of one that is stopped.
//! - A snapshot that a client took for its job is removed when no client holds it. The snapshot's name says that it is such
//!   a one, so a later daemon removes it too. Snapshots with other names are never removed.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use axum::Json;
use axum::extract::State;
use axum::extract::rejection::JsonRejection;
use parking_lot::Mutex;
use tokio::sync::watch;

use super::pool::JobKind;
use super::wire::{ClientJob, HELD_SNAPSHOT, Job, Removed, WorkKind, WorkState, rfc3339_millis};
use super::{Answer, ApiError, Cause, Control, Name, in_pool, quick};
use crate::store::StoreErrorKind;

/// Most jobs of clients. Each holds a connection.
const MOST_JOBS: usize = 64;
/// How long a client may take to hold its job, again after its connection broke.
const UNHELD: Duration = Duration::from_secs(10);
/// How long clients of an earlier worker may take, and how often all snapshots are looked through after that.
const SWEEP: Duration = Duration::from_secs(60);
const TICK: Duration = Duration::from_secs(1);
/// How long a cancellation waits for the client.
const ENDING: Duration = Duration::from_secs(5);
/// What cancels a job, as the job reports it.
const CANCELLED: &str = "an operator cancelled it";

/// What the client of a job is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    GoOn,
    Cancel,
    /// This worker ends; the next one has to be told of the job.
    Moves,
}

struct Entry {
    work: ClientJob,
    began: SystemTime,
    order: watch::Sender<Order>,
    /// Requests that hold it, and since when there is none.
    holders: usize,
    unheld: Instant,
}

impl Entry {
    fn job(&self, id: &str) -> Job {
        let ClientJob { kind, disk, bytes, total, .. } = &self.work;
        let seconds = self.began.elapsed().unwrap_or_default().as_secs();
        let rate = bytes.checked_div(seconds).unwrap_or(0);
        let is_cancelled = *self.order.borrow() == Order::Cancel;
        Job {
            id: id.to_owned(),
            kind: *kind,
            disk: Some(disk.clone()),
            state: if is_cancelled { WorkState::Cancelled } else { WorkState::Copying },
            bytes: *bytes,
            total: *total,
            percent: super::jobs::percent(*bytes, *total),
            rate,
            seconds_left: (rate > 0).then(|| total.saturating_sub(*bytes).div_ceil(rate)),
            error: is_cancelled.then(|| CANCELLED.to_owned()),
            began: rfc3339_millis(self.began),
            ..Job::default()
        }
    }
}

/// See the module.
pub struct ClientJobs {
    jobs: Mutex<HashMap<String, Entry>>,
    /// Whether this worker ends. Changed under the lock of `jobs`.
    is_closed: AtomicBool,
    since: Instant,
}

impl Default for ClientJobs {
    fn default() -> Self {
        Self { jobs: Mutex::default(), is_closed: AtomicBool::new(false), since: Instant::now() }
    }
}

fn no_job(id: &str) -> ApiError {
    ApiError::new(Cause::NotFound, format!("job {id}: there is no job of that name; see `plyfs job ls`"))
}

fn is_held_name(name: &str) -> bool {
    let digits = name.strip_prefix(HELD_SNAPSHOT).unwrap_or_default();
    digits.len() == 16 && digits.bytes().all(|byte| byte.is_ascii_hexdigit())
}

impl ClientJobs {
    fn put(&self, id: &str, work: ClientJob) -> Result<Job, ApiError> {
        let prefix = format!("{}-{}-", work.kind.name(), work.disk);
        let is_valid = matches!(work.kind, WorkKind::Export | WorkKind::Import)
            && id.strip_prefix(&prefix).is_some_and(|rest| {
                (1..=32).contains(&rest.len()) && rest.bytes().all(|byte| byte.is_ascii_alphanumeric())
            })
            && work.snapshot.as_deref().is_none_or(is_held_name);
        if !is_valid {
            return Err(ApiError::invalid(format!(
                "job {id}: a client's job is an export or an import, is named KIND-DISK-TEXT, and holds a snapshot named \
                 {HELD_SNAPSHOT} and 16 hexadecimal digits"
            )));
        }
        let mut jobs = self.jobs.lock();
        if let Some(entry) = jobs.get_mut(id) {
            if (entry.work.kind, &entry.work.disk, &entry.work.snapshot)
                != (work.kind, &work.disk, &work.snapshot)
            {
                return Err(ApiError::new(Cause::Exists, format!("job {id}: another client has it")));
            }
            entry.work = work;
            return Ok(entry.job(id));
        }
        if jobs.len() >= MOST_JOBS {
            let why = format!("{MOST_JOBS} clients copy disks already; the copy is made, but not listed");
            return Err(ApiError::new(Cause::Overloaded, why));
        }
        let order = if self.is_closed.load(Ordering::Relaxed) { Order::Moves } else { Order::GoOn };
        let (order, unheld) = (watch::Sender::new(order), Instant::now());
        let entry = Entry { work, began: SystemTime::now(), order, holders: 0, unheld };
        let job = entry.job(id);
        jobs.insert(id.to_owned(), entry);
        Ok(job)
    }

    fn get(&self, id: &str) -> Option<Job> {
        self.jobs.lock().get(id).map(|entry| entry.job(id))
    }

    /// All of them.
    pub(super) fn list(&self) -> Vec<Job> {
        self.jobs.lock().iter().map(|(id, entry)| entry.job(id)).collect()
    }

    fn hold(&self, id: &str) -> Option<Hold<'_>> {
        let mut jobs = self.jobs.lock();
        let entry = jobs.get_mut(id)?;
        entry.holders += 1;
        Some(Hold { jobs: self, id: id.to_owned(), order: entry.order.subscribe() })
    }

    fn order(&self, id: &str, order: Order) -> bool {
        let jobs = self.jobs.lock();
        jobs.get(id).map(|entry| entry.order.send_replace(order)).is_some()
    }

    /// Tells the clients that the next worker has to be told. To be called before this one drains.
    pub(super) fn close(&self) {
        let jobs = self.jobs.lock();
        // A request to hold a job that comes later does not wait either.
        self.is_closed.store(true, Ordering::Relaxed);
        for entry in jobs.values().filter(|entry| *entry.order.borrow() == Order::GoOn) {
            entry.order.send_replace(Order::Moves);
        }
    }

    fn end(&self, id: &str) -> Option<Entry> {
        self.jobs.lock().remove(id)
    }

    /// Forgets the jobs whose clients are gone. Returns the snapshots that they took, with their disks.
    fn forget_unheld(&self, now: Instant) -> Vec<(String, String)> {
        let is_gone = |entry: &Entry| entry.holders == 0 && now.duration_since(entry.unheld) >= UNHELD;
        let gone = self.jobs.lock().extract_if(|_, entry| is_gone(entry)).collect::<Vec<_>>();
        gone.into_iter().filter_map(|(_, entry)| Some((entry.work.disk, entry.work.snapshot?))).collect()
    }

    fn holds(&self, disk: &str, snapshot: &str) -> bool {
        let has = |entry: &Entry| entry.work.disk == disk && entry.work.snapshot.as_deref() == Some(snapshot);
        self.jobs.lock().values().any(has)
    }
}

/// A request that holds a job. The server drops it when the client is gone.
struct Hold<'a> {
    jobs: &'a ClientJobs,
    id: String,
    order: watch::Receiver<Order>,
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        if let Some(entry) = self.jobs.jobs.lock().get_mut(&self.id) {
            entry.holders = entry.holders.saturating_sub(1);
            entry.unheld = Instant::now();
        }
    }
}

/// Announce a job
///
/// Tells the daemon of an export or import that the client does itself, and how far it is. The same request again brings
/// the progress up to date. Its answer says whether the job was cancelled.
#[utoipa::path(
    put,
    path = "/v1/jobs/{id}",
    tag = "jobs",
    operation_id = "announce_job",
    request_body = ClientJob,
    responses((status = 200, description = "The job.", body = Job))
)]
pub(super) async fn announce(
    State(c): State<Control>,
    Name(id): Name,
    body: Result<Json<ClientJob>, JsonRejection>,
) -> Answer<Job> {
    let Json(work) = body?;
    quick(move || {
        c.store.disk(&work.disk)?;
        c.clients.put(&id, work)
    })
    .await
}

/// Hold an announced job
///
/// The answer comes when the job is cancelled or has ended, or this worker ends: then the client announces the job to the
/// next worker. A job that no client holds is forgotten after 10 seconds, and the snapshot that it was announced with is
/// removed.
#[utoipa::path(
    post,
    path = "/v1/jobs/{id}/hold",
    tag = "jobs",
    operation_id = "hold_job",
    responses((status = 200, description = "The job.", body = Job))
)]
pub(super) async fn hold(State(c): State<Control>, Name(id): Name) -> Answer<Job> {
    let mut held = c.clients.hold(&id).ok_or_else(|| no_job(&id))?;
    // An error means that the job has ended.
    let _ = held.order.wait_for(|order| *order != Order::GoOn).await;
    drop(held);
    c.clients.get(&id).map(Json).ok_or_else(|| no_job(&id))
}

/// End an announced job
///
/// The client is done with it. The daemon forgets it.
#[utoipa::path(
    delete,
    path = "/v1/jobs/{id}",
    tag = "jobs",
    operation_id = "end_job",
    responses((status = 200, description = "The job is forgotten.", body = Removed))
)]
pub(super) async fn end(State(c): State<Control>, Name(id): Name) -> Answer<Removed> {
    c.clients.end(&id).ok_or_else(|| no_job(&id))?;
    Ok(Json(Removed { removed: vec![id] }))
}

impl Control {
    pub(super) fn client_job(&self, id: &str) -> Option<Job> {
        self.clients.get(id)
    }

    /// Cancels a job of a client, and waits a while for its end. `None` when there is no such job.
    pub(super) async fn cancel_client_job(&self, id: &str) -> Option<Job> {
        if !self.clients.order(id, Order::Cancel) {
            return None;
        }
        let job = self.clients.get(id)?;
        let begun = Instant::now();
        while self.clients.get(id).is_some() && begun.elapsed() < ENDING {
            tokio::time::sleep(ENDING / 200).await;
        }
        Some(job)
    }

    /// The snapshots that clients took for their jobs, and that no client holds.
    fn unheld_snapshots(&self) -> Vec<(String, String)> {
        let mut found = self.store.snapshots_named(is_held_name);
        found.retain(|(disk, snapshot)| !self.clients.holds(disk, snapshot));
        found
    }

    fn remove_unheld(&self, snapshots: &[(String, String)]) {
        for (disk, snapshot) in snapshots {
            match self.store.remove_snapshot(disk, snapshot) {
                Ok(()) => tracing::info!(
                    disk,
                    snapshot,
                    "the snapshot of an export whose client is gone is removed"
                ),
                Err(error) if error.kind() == StoreErrorKind::NotFound => {}
                Err(error) => tracing::warn!(
                    disk, snapshot, %error,
                    "the snapshot of an export whose client is gone cannot be removed; it is tried again in a minute"
                ),
            }
        }
    }
}

/// Forgets jobs whose clients are gone, and removes their snapshots, for ever.
pub(super) async fn tick(control: Control) {
    let mut interval = tokio::time::interval(TICK);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut swept = control.clients.since;
    loop {
        interval.tick().await;
        let now = Instant::now();
        let gone = control.clients.forget_unheld(now);
        let is_sweep = now.duration_since(swept) >= SWEEP;
        if gone.is_empty() && !is_sweep {
            continue;
        }
        swept = if is_sweep { now } else { swept };
        let c = control.clone();
        let work = move || {
            c.remove_unheld(&gone);
            if is_sweep {
                c.remove_unheld(&c.unheld_snapshots());
            }
            Ok(())
        };
        // When all threads are busy, the next sweep does it.
        let _ = in_pool(JobKind::Work, work).await;
    }
}

#[cfg(test)]
mod tests;
