//! A registered base, and its open files once a disk needs them.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use parking_lot::{Mutex, RwLock};

use super::StoreError;
use super::records::RECORD_LIMIT;
use crate::base::{Base, Layer};
use crate::cache::BlockCache;
use crate::events::{Events, Traffic};
use crate::format::layout;
use crate::format::record::{
    Backing, BaseIdentity, BaseOptions, BaseRecord, FileProof, ImageFile, ImageFormat, Moved,
};
use crate::image::{self, Chain};
use crate::io::{Medium, replace};
use crate::mutant::Mutant;
use crate::source::{
    FileSource, OpenHere, OpenImage, ProvenFile, Source, SourceError, SourceErrorKind, compare,
};
use crate::stats::{Counters, Registry};

/// Opens the files of bases.
pub trait Sources: Send + Sync {
    /// Opens a file of this host. The caller compares its identity.
    ///
    /// # Errors
    /// When it cannot be opened.
    fn file(&self, path: &Path) -> Result<FileSource, SourceError>;

    /// A file that was opened, each group of it proven when it is read where its record names a proof.
    ///
    /// # Errors
    /// When the proof cannot be opened.
    fn proven(&self, file: FileSource, proof: Option<&FileProof>) -> Result<Arc<dyn Source>, SourceError> {
        ProvenFile::wrap(&OpenHere, file, proof)
    }

    /// Opens a file that is kept block by block ([`BaseRecord::keeps`]) and checks its identity: a file behind a
    /// network, or a file of this host that is being copied. Asks no server: a server that is down does not keep a disk
    /// from being attached.
    ///
    /// # Errors
    /// When this process has no network. For a file of this host as [`file`](Self::file), unless all of it is in the
    /// store.
    fn kept(&self, base: &BaseRecord, file: &ImageFile) -> Result<Arc<dyn Source>, SourceError>;

    /// Bytes that this host keeps of a file that is read through its cache. Waits for no disk.
    fn kept_bytes(&self, _base: &BaseRecord, _file: &ImageFile) -> u64 {
        0
    }

    /// The traffic counters of the base.
    fn traffic(&self, base: &BaseRecord) -> Arc<Traffic>;
}

/// Without a network.
impl<O: OpenImage> Sources for O {
    fn file(&self, path: &Path) -> Result<FileSource, SourceError> {
        FileSource::open_with(self, path)
    }

    fn proven(&self, file: FileSource, proof: Option<&FileProof>) -> Result<Arc<dyn Source>, SourceError> {
        ProvenFile::wrap(self, file, proof)
    }

    fn kept(&self, _base: &BaseRecord, file: &ImageFile) -> Result<Arc<dyn Source>, SourceError> {
        if file.is_local() {
            return self.proven(self.file(Path::new(&file.source))?, file.proof.as_ref());
        }
        let (why, advice) = ("there is no network here", "run `plyfs serve`");
        Err(SourceError::remote(SourceErrorKind::Unreachable, "open", "a URL", why, advice))
    }

    fn traffic(&self, base: &BaseRecord) -> Arc<Traffic> {
        Events::new().base(base.id, &base.name)
    }
}

/// The reader for a format; none for raw.
pub(super) fn reader(format: ImageFormat) -> Option<image::Format> {
    match format {
        ImageFormat::Raw => None,
        ImageFormat::Qcow2 => Some(image::Format::Qcow2),
        ImageFormat::Vmdk => Some(image::Format::Vmdk),
    }
}

#[derive(Default)]
struct AttachState {
    base: Option<Arc<Base>>,
    /// Number of detaches. An attach that runs meanwhile starts again.
    detached: u64,
}

/// One base of a store.
pub struct BaseNode {
    record: BaseRecord,
    /// Shared by the records of its disks.
    identity: Arc<BaseIdentity>,
    options: RwLock<BaseOptions>,
    /// Taken inside `options`.
    moved: RwLock<Vec<Moved>>,
    medium: Arc<dyn Medium>,
    cache: Arc<BlockCache>,
    sources: Arc<dyn Sources>,
    /// Held while the files are opened, for as long as their filesystem hangs.
    attaching: Mutex<()>,
    /// Never held through a system call.
    attached: Mutex<AttachState>,
    /// All instances that disks may still hold: the current one, and those from before a detach.
    handed_out: Mutex<Vec<Weak<Base>>>,
    counters: OnceLock<Arc<Counters>>,
    stats: Registry,
    /// Handles of its own file that this worker has opened.
    opened: AtomicUsize,
    /// An earlier worker may have opened handles.
    inherited: AtomicBool,
    /// Bytes that files of this host occupied when they were opened last, by number; 0 is the image.
    allocated: Mutex<BTreeMap<usize, u64>>,
}

impl BaseNode {
    pub(super) fn new(
        record: BaseRecord,
        medium: Arc<dyn Medium>,
        cache: Arc<BlockCache>,
        sources: Arc<dyn Sources>,
        stats: Registry,
    ) -> Self {
        let (options, moved) = (RwLock::new(record.options), RwLock::new(record.moved.clone()));
        let identity = Arc::new(record.image.identity.clone());
        Self {
            record,
            identity,
            options,
            moved,
            medium,
            cache,
            sources,
            attaching: Mutex::new(()),
            attached: Mutex::default(),
            handed_out: Mutex::default(),
            counters: OnceLock::new(),
            stats,
            opened: AtomicUsize::new(0),
            inherited: AtomicBool::new(false),
            allocated: Mutex::default(),
        }
    }

    /// Bytes that this host has of the base: what the cache keeps of the files that are read through it, and what the
    /// others occupied when they were opened last. Of a file that was not opened yet, its size. Waits for no file.
    pub fn stored_bytes(&self) -> u64 {
        let options = self.options();
        let of = |(number, file): (usize, &ImageFile)| match options.keeps(file) {
            true => self.sources.kept_bytes(&self.record, file),
            false => self.allocated.lock().get(&number).copied().unwrap_or(file.identity.size),
        };
        self.record.files().enumerate().map(of).sum()
    }

    /// Notes that a client opened the base's own file.
    pub fn opened(&self) {
        self.opened.fetch_add(1, Ordering::Relaxed);
    }

    /// Notes that a client closed the base's own file. The client may have opened it under an earlier worker.
    pub fn closed(&self) {
        let less = |opened: usize| opened.checked_sub(1);
        let _ = self.opened.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
    }

    /// Notes whether an earlier worker may have opened the base's own file.
    pub fn set_inherited(&self, inherited: bool) {
        self.inherited.store(inherited, Ordering::Relaxed);
    }

    /// How many handles of the base's own file clients have; `None` when an earlier worker may have opened some.
    pub fn open_handles(&self) -> Option<usize> {
        (!self.inherited.load(Ordering::Relaxed)).then(|| self.opened.load(Ordering::Relaxed))
    }

    /// Its number.
    pub fn id(&self) -> u64 {
        self.record.id
    }

    /// How the record of a disk on it names it.
    pub(super) fn backing(&self) -> Backing {
        Backing { base: self.record.id, identity: self.identity.clone() }
    }

    /// The record as registered. Options and URLs may have changed since ([`BaseNode::options`],
    /// [`BaseNode::current`]).
    pub fn record(&self) -> &BaseRecord {
        &self.record
    }

    /// How the base is fetched and kept.
    pub fn options(&self) -> BaseOptions {
        *self.options.read()
    }

    /// Changes durably how the base is fetched and kept. Holders of an attached base keep the options that it had.
    ///
    /// # Errors
    /// Errors of the storage; nothing has then changed.
    pub fn set_options(&self, change: impl FnOnce(&mut BaseOptions)) -> Result<BaseOptions, StoreError> {
        // One change runs at a time. A reader waits for one sync at most.
        let mut options = self.options.write();
        let mut new = *options;
        change(&mut new);
        if new != *options {
            self.write(new, &self.moved.read())?;
            *options = new;
        }
        Ok(new)
    }

    /// The record with its current options and URLs.
    pub fn current(&self) -> BaseRecord {
        let options = self.options.read();
        BaseRecord { options: *options, moved: self.moved.read().clone(), ..self.record.clone() }
    }

    /// Replaces durably the URLs of one file (0 is the image), and clears that the base is given up.
    ///
    /// # Errors
    /// `Invalid` when there is no such file or the record gets too long; errors of the storage. Nothing has then
    /// changed.
    pub fn set_urls(&self, file: u8, urls: Vec<String>) -> Result<(), StoreError> {
        let invalid = |why: &str| Err(StoreError::invalid(self.object(), why));
        if usize::from(file) > self.record.backing.len() {
            return invalid("it has no file of that number");
        }
        if !(1..=1 + ImageFile::MAX_FILES).contains(&urls.len()) {
            return invalid("a file has 1 URL and at most 16 mirrors");
        }
        let mut options = self.options.write();
        let mut moved = self.moved.write();
        let mut new = moved.clone();
        new.retain(|moved| moved.file != file);
        new.push(Moved { file, urls });
        new.sort_by_key(|moved| moved.file);
        let served = BaseOptions { given_up: false, ..*options };
        self.write(served, &new)?;
        (*options, *moved) = (served, new);
        Ok(())
    }

    fn write(&self, options: BaseOptions, moved: &[Moved]) -> Result<(), StoreError> {
        let record = BaseRecord { options, moved: moved.to_vec(), ..self.record.clone() };
        let bytes = record.encode();
        if bytes.len() as u64 > RECORD_LIMIT {
            let why = "its paths and URLs are too long together; omit some";
            return Err(StoreError::invalid(self.object(), why));
        }
        replace(&*self.medium, layout::BASES, &layout::base_record(record.id), &bytes)
            .map_err(StoreError::io(self.object(), "writing its record"))
    }

    /// Removes the token at a clean end of the daemon: the request that registered the base is answered, and an older
    /// plyfs can read the record again.
    pub(super) fn forget_token(&self) {
        if self.record.token.is_none() {
            return;
        }
        let record = BaseRecord { token: None, ..self.current() };
        let written =
            replace(&*self.medium, layout::BASES, &layout::base_record(record.id), &record.encode());
        if let Err(error) = written {
            tracing::warn!(base = record.name, %error, "the token of a request stays in the base's record, which an older plyfs then cannot read");
        }
    }

    fn object(&self) -> String {
        format!("base {}", self.record.name)
    }

    /// Its counters: of requests on it, and of what requests on its disks wait for.
    pub fn counters(&self) -> &Arc<Counters> {
        self.counters.get_or_init(|| Arc::new(self.stats.add(self.id())))
    }

    /// Bytes of it in the memory cache.
    pub fn cached_bytes(&self) -> u64 {
        self.attached().map_or(0, |b| b.cached_bytes())
    }

    /// Why the base cannot be used, if so. Looks at the files of this host.
    pub fn problem(&self) -> Option<String> {
        match self.attach() {
            Ok(base) => base.check().err().map(|e| e.to_string()),
            Err(e) => Some(e.to_string()),
        }
    }

    /// The base, if it is attached.
    pub fn attached(&self) -> Option<Arc<Base>> {
        self.attached.lock().base.clone()
    }

    /// Refuses all reads of the base, now and after a restart: its contents do not have their digest.
    ///
    /// # Errors
    /// When the refusal cannot be recorded; the base is then refused until the next start.
    pub fn refuse(&self) -> Result<(), StoreError> {
        // First prevent that it is attached again.
        let noted = match Mutant::RefusalNotRecorded.is_active() {
            true => Ok(self.options()),
            false => self.set_options(|options| options.refused = true),
        };
        self.detach();
        self.handed_out.lock().iter().filter_map(Weak::upgrade).for_each(|base| base.refuse());
        noted.map(drop)
    }

    /// Serves a refused base again: its contents have their digest.
    ///
    /// # Errors
    /// When that cannot be recorded; the base then stays refused.
    pub fn accept(&self) -> Result<(), StoreError> {
        self.set_options(|options| options.refused = false)?;
        self.handed_out.lock().iter().filter_map(Weak::upgrade).for_each(|base| base.accept());
        Ok(())
    }

    /// Drops all cached blocks of the base from memory: its source returned wrong bytes.
    pub fn purge(&self) {
        self.handed_out.lock().iter().filter_map(Weak::upgrade).for_each(|base| base.purge());
    }

    /// Detaches the base, so that the next attach opens its sources anew. Current holders keep theirs.
    pub fn detach(&self) {
        let mut attached = self.attached.lock();
        attached.detached += 1;
        attached.base = None;
    }

    /// Opens the sources, after a check that they are what was registered. Asks no server.
    ///
    /// # Errors
    /// `Source` when a source cannot be opened; `BaseChanged` when it was replaced or modified.
    pub fn attach(&self) -> Result<Arc<Base>, StoreError> {
        if let Some(base) = self.attached() {
            return Ok(base);
        }
        let _attaching = self.attaching.lock();
        loop {
            let detached = {
                let attached = self.attached.lock();
                if let Some(base) = &attached.base {
                    return Ok(base.clone());
                }
                attached.detached
            };
            let base = self.open_layers()?;
            // A refusal and a reopening detach the base after they are recorded: this attach sees either the count here
            // or the record.
            let mut attached = self.attached.lock();
            if attached.detached == detached {
                let mut handed_out = self.handed_out.lock();
                handed_out.retain(|base| base.strong_count() > 0);
                handed_out.push(Arc::downgrade(&base));
                attached.base = Some(base.clone());
                return Ok(base);
            }
        }
    }

    fn open_layers(&self) -> Result<Arc<Base>, StoreError> {
        let record = self.current();
        if record.options.refused {
            return Err(StoreError::BaseChanged {
                object: self.object(),
                why: "its contents do not have the digest that it was registered with; when its source has the right \
                      contents again, run `plyfs base verify`"
                    .into(),
            });
        }
        let mut layers = Vec::with_capacity(1 + record.backing.len());
        for (index, file) in record.files().enumerate() {
            let source = self.open(&record, index, file)?;
            let chain = if index < record.backing.len() { Chain::OnBacking } else { Chain::Alone };
            let open = |format| image::open(format, source.clone(), file.disk_size, chain);
            let image = reader(file.format).map(open);
            layers.push(Layer { source, image });
        }
        let traffic = self.sources.traffic(&record);
        let (id, name) = (record.id, record.name.clone());
        Ok(Arc::new(Base::layered(id, name, record.size(), layers, self.cache.clone(), traffic)))
    }

    fn open(
        &self,
        record: &BaseRecord,
        number: usize,
        file: &ImageFile,
    ) -> Result<Arc<dyn Source>, StoreError> {
        let wrap = |source| StoreError::Source { object: self.object(), source };
        if record.keeps(file) {
            return self.sources.kept(record, file).map_err(wrap);
        }
        let source = self.sources.file(Path::new(&file.source)).map_err(wrap)?;
        self.allocated.lock().insert(number, source.allocated());
        match compare(&file.identity, &source.found(), record.options.strictness).difference() {
            None => self.sources.proven(source, file.proof.as_ref()).map_err(wrap),
            Some(why) => Err(StoreError::BaseChanged {
                object: self.object(),
                why: format!(
                    "{} changed since it was registered: {why}; put the original file back, its disks are useless \
                     on any other",
                    file.source
                ),
            }),
        }
    }
}
