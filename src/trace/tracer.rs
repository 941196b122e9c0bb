//! Decides which boots are recorded, and which recordings are saved.
//!
//! A base without a trace gets one from its first boot. plyfs records the disks on it that were never written to, and
//! saves the first recording that looks like a boot. A look at a partition table reads too little; a copy of the disk
//! jumps too rarely. A recording that the operator requested is saved in any case.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, OnceLock, Weak};
use std::time::Instant;

use parking_lot::Mutex;

use super::tap::{FirstBoots, Slot};
use super::{End, Limits, Player, Recorder, Tap, TraceStore};
use crate::events::{Event, Events, Kind};
use crate::format::BLOCK;
use crate::format::trace::{Origin, Trace};
use crate::io::sys;

/// The smallest boot, bytes.
const SMALLEST_BOOT: u64 = 1 << 20;
/// A recording with this many bytes per jump is a copy of the disk, no boot.
const COPY: u64 = 1 << 20;

/// Whether first boots are recorded without a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AutoRecord {
    /// They are.
    Yes,
    /// Only requested recordings are made.
    No,
}

/// The base of a recording.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TracedBase {
    /// Its number.
    pub base: u64,
    /// Its name.
    pub name: String,
    /// Bytes of its virtual disk.
    pub size: u64,
    /// Identifies the image.
    pub origin: Origin,
}

/// A recording of a base that is under way, or waits for a first read.
struct Session {
    subject: TracedBase,
    taps: Vec<Weak<Tap>>,
    trigger: Trigger,
}

enum Trigger {
    /// A request to record the disk of the only tap.
    Requested(Arc<Recorder>),
    /// The first boot of any of the taps' disks.
    Automatic(Arc<FirstBoots>),
}

/// A recording that has ended and was saved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedRecording {
    /// Number of the base.
    pub base: u64,
    /// Its name.
    pub name: String,
    /// Entries of the trace.
    pub entries: usize,
    /// Bytes in the entries.
    pub bytes: u64,
    /// Milliseconds from the first entry to the last.
    pub duration_ms: u32,
    /// Why it ended.
    pub end: End,
}

/// Why a recording cannot begin or cannot be saved.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// Another recording of this base is under way.
    #[error("a recording of base {base} by disk number {disk} is under way")]
    UnderWay {
        /// The base.
        base: String,
        /// The disk.
        disk: u64,
    },
    /// This disk is not being recorded.
    #[error("nothing is being recorded")]
    None,
    /// The disk read nothing from its base.
    #[error("nothing was read from the base")]
    Empty,
    /// The trace could not be saved.
    #[error("the trace cannot be saved: {0}")]
    Io(#[from] io::Error),
}

/// See the module.
pub struct Tracer {
    store: TraceStore,
    limits: Limits,
    automatic: AutoRecord,
    events: Events,
    sessions: Mutex<Vec<Session>>,
    /// Bases that have a trace, readable or not.
    known: Mutex<BTreeSet<u64>>,
    prefetch: OnceLock<Prefetch>,
}

/// Called with the number of a base that has a trace when a disk begins to read it. Must not wait.
type Prefetch = Arc<dyn Fn(u64) + Send + Sync>;

impl Tracer {
    /// A tracer over the traces in the store.
    pub fn new(store: TraceStore, limits: Limits, automatic: AutoRecord, events: Events) -> Self {
        let known = store.bases().unwrap_or_else(|error| {
            tracing::warn!(%error, "the traces in the store cannot be listed; they are not played");
            Vec::new()
        });
        let known = Mutex::new(known.into_iter().collect());
        let (sessions, prefetch) = (Mutex::default(), OnceLock::new());
        Self { store, limits, automatic, events, sessions, known, prefetch }
    }

    /// The traces in the store. To change them use [`save`](Self::save) and [`remove`](Self::remove).
    pub fn store(&self) -> &TraceStore {
        &self.store
    }

    /// From now on calls `prefetch` at the first read of each disk whose base has a trace.
    pub fn prefetch_with(&self, prefetch: impl Fn(u64) + Send + Sync + 'static) {
        let _ = self.prefetch.set(Arc::new(prefetch));
    }

    /// A disk was attached. If its base has a trace, the trace is played at the first read. If not, and the disk was never
    /// written to, its first boot may become the trace. Does not wait.
    pub fn attached(&self, tap: &Arc<Tap>, written: bool, subject: &TracedBase) {
        if let Some(prefetch) = self.prefetch.get()
            && self.known.lock().contains(&subject.base)
        {
            let (prefetch, base) = (prefetch.clone(), subject.base);
            tap.at_first_read(Box::new(move || prefetch(base)));
            return;
        }
        if self.automatic == AutoRecord::No || written || self.known.lock().contains(&subject.base) {
            return;
        }
        let mut sessions = self.sessions.lock();
        let at = sessions.iter().position(|session| session.subject.base == subject.base);
        let at = at.unwrap_or_else(|| {
            let trigger = Trigger::Automatic(Arc::new(FirstBoots::new(subject.size, self.limits)));
            sessions.push(Session { subject: subject.clone(), taps: Vec::new(), trigger });
            sessions.len() - 1
        });
        let session = &mut sessions[at];
        if let Trigger::Automatic(first_boots) = &session.trigger {
            tap.set(Slot::Waiting(first_boots.clone()));
            session.taps.retain(|other| other.strong_count() > 0 && other.as_ptr() != Arc::as_ptr(tap));
            session.taps.push(Arc::downgrade(tap));
        }
    }

    /// Records the reads of a disk from now on, as the trace of its base.
    ///
    /// # Errors
    /// `UnderWay` when a requested recording of this base is under way.
    pub fn record(&self, tap: &Arc<Tap>, subject: TracedBase) -> Result<(), RecordError> {
        let mut sessions = self.sessions.lock();
        if let Some(at) = sessions.iter().position(|session| session.subject.base == subject.base) {
            if matches!(sessions[at].trigger, Trigger::Requested(_)) {
                let disk = sessions[at].taps.first().and_then(Weak::upgrade).map_or(0, |tap| tap.disk());
                return Err(RecordError::UnderWay { base: subject.name, disk });
            }
            sessions.remove(at).close();
        }
        let recorder = Arc::new(Recorder::new(subject.size, self.limits));
        tap.set(Slot::Recording(recorder.clone()));
        sessions.push(Session {
            subject,
            taps: vec![Arc::downgrade(tap)],
            trigger: Trigger::Requested(recorder),
        });
        Ok(())
    }

    /// Ends the recording of a disk, requested or not, and saves it. May wait for the store.
    ///
    /// # Errors
    /// `None` when there is none, `Empty` when the disk has read nothing, `Io` when it cannot be saved.
    pub fn stop(&self, disk: u64) -> Result<SavedRecording, RecordError> {
        let (session, recorder) = {
            let mut sessions = self.sessions.lock();
            let found = sessions.iter().enumerate().find_map(|(at, session)| {
                session
                    .recorders()
                    .into_iter()
                    .find(|(of, _)| *of == disk)
                    .map(|(_, recorder)| (at, recorder))
            });
            let (at, recorder) = found.ok_or(RecordError::None)?;
            (sessions.remove(at), recorder)
        };
        session.close();
        recorder.end(End::Asked);
        self.save_recording(&session.subject, &recorder, End::Asked)
    }

    /// Whether [`tick`](Self::tick) has work.
    pub fn is_recording(&self) -> bool {
        !self.sessions.lock().is_empty()
    }

    /// The numbers of the disks that are being recorded.
    pub fn recording(&self) -> Vec<u64> {
        self.sessions.lock().iter().flat_map(Session::recorders).map(|(disk, _)| disk).collect()
    }

    /// Saves the recordings that have ended. To be called about once a second; may wait for the store.
    pub fn tick(&self, now: Instant) {
        let mut kept = Vec::new();
        self.sessions.lock().retain(|session| {
            // The base or all its disks were removed.
            if session.taps.iter().all(|tap| tap.strong_count() == 0) {
                return false;
            }
            let ended = session
                .recorders()
                .into_iter()
                .filter_map(|(disk, recorder)| recorder.ended(now).map(|end| (disk, recorder, end)));
            for (disk, recorder, end) in ended {
                match &session.trigger {
                    Trigger::Automatic(first_boots) if !is_a_boot(&recorder, end) => {
                        let slot = if is_a_copy(&recorder, end) {
                            Slot::Closed
                        } else {
                            Slot::Waiting(first_boots.clone())
                        };
                        first_boots.end(disk);
                        session.tap_of(disk).into_iter().for_each(|tap| tap.set(slot.clone()));
                    }
                    _ => {
                        session.close();
                        kept.push((session.subject.clone(), recorder, end));
                        return false;
                    }
                }
            }
            true
        });
        for (subject, recorder, end) in kept {
            self.save_or_warn(&subject, &recorder, end);
        }
    }

    /// Ends and saves all recordings, because the worker ends. May wait for the store.
    pub fn close(&self) {
        let sessions = std::mem::take(&mut *self.sessions.lock());
        for session in sessions {
            session.close();
            for (_, recorder) in session.recorders() {
                recorder.end(End::Asked);
                if matches!(session.trigger, Trigger::Requested(_)) || is_a_boot(&recorder, End::Asked) {
                    self.save_or_warn(&session.subject, &recorder, End::Asked);
                    break;
                }
            }
        }
    }

    fn save_or_warn(&self, subject: &TracedBase, recorder: &Recorder, end: End) {
        match self.save_recording(subject, recorder, end) {
            Ok(_) | Err(RecordError::Empty) => {}
            Err(error) => {
                tracing::warn!(base = subject.name, %error, "the recording of a boot cannot be saved and is lost")
            }
        }
    }

    fn save_recording(
        &self,
        subject: &TracedBase,
        recorder: &Recorder,
        end: End,
    ) -> Result<SavedRecording, RecordError> {
        let TracedBase { base, name, size, origin } = subject.clone();
        let entries = recorder.entries();
        if entries.is_empty() {
            return Err(RecordError::Empty);
        }
        let trace = Trace { base: name.clone(), size, origin, recorded_ns: sys::now_ns(), entries };
        self.save(base, &trace)?;
        let bytes = trace.blocks() * BLOCK;
        let count = trace.entries.len();
        let event = Event::of_base(Kind::TraceRecorded, &name).bytes(bytes).count(count as u64);
        self.events.emit(event);
        tracing::info!(base = name, entries = count, bytes, ?end, "a trace was recorded");
        Ok(SavedRecording { base, name, entries: count, bytes, duration_ms: trace.duration_ms(), end })
    }

    /// Saves a trace as that of a base.
    ///
    /// # Errors
    /// As [`TraceStore::save`].
    pub fn save(&self, base: u64, trace: &Trace) -> io::Result<()> {
        self.store.save(base, trace)?;
        self.known.lock().insert(base);
        Ok(())
    }

    /// Removes the trace of a base; false when it has none. The next first boot is recorded.
    ///
    /// # Errors
    /// As [`TraceStore::remove`].
    pub fn remove(&self, base: u64) -> io::Result<bool> {
        let removed = self.store.remove(base)?;
        self.known.lock().remove(&base);
        Ok(removed)
    }

    /// A player for a boot on this base, if there is a trace for it. Reads the store.
    pub fn player(&self, subject: &TracedBase) -> Option<Player> {
        if !self.known.lock().contains(&subject.base) {
            return None;
        }
        match self.store.load(subject.base) {
            Ok(Some(trace)) if trace.size == subject.size && !trace.origin.contradicts(&subject.origin) => {
                Some(Player::new(&trace, subject.size))
            }
            Ok(_) => None,
            Err(error) => {
                tracing::warn!(base = subject.name, %error, "the trace of a base cannot be read and is not played; record it again");
                None
            }
        }
    }
}

impl Session {
    /// Removes the recorders from all taps.
    fn close(&self) {
        for tap in self.taps.iter().filter_map(Weak::upgrade) {
            tap.set(Slot::Closed);
        }
    }

    fn tap_of(&self, disk: u64) -> Option<Arc<Tap>> {
        self.taps.iter().filter_map(Weak::upgrade).find(|tap| tap.disk() == disk)
    }

    /// The disks that are being recorded, with their recorders.
    fn recorders(&self) -> Vec<(u64, Arc<Recorder>)> {
        match &self.trigger {
            Trigger::Automatic(first_boots) => first_boots.running(),
            Trigger::Requested(recorder) => {
                let disk = self.taps.first().and_then(Weak::upgrade).map(|tap| tap.disk());
                disk.map(|disk| (disk, recorder.clone())).into_iter().collect()
            }
        }
    }
}

/// Whether a recording looks like a copy of the whole disk.
fn is_a_copy(recorder: &Recorder, end: End) -> bool {
    let entries = recorder.entries();
    let jumps = entries.windows(2).filter(|pair| pair[0].first + pair[0].blocks != pair[1].first).count();
    matches!(end, End::Bytes | End::Entries) || recorder.bytes() / (jumps as u64 + 1) >= COPY
}

/// Whether a recording looks like a boot.
fn is_a_boot(recorder: &Recorder, end: End) -> bool {
    recorder.bytes() >= SMALLEST_BOOT && !is_a_copy(recorder, end)
}
