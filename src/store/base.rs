//! A registered base, and the files behind it once somebody needs them.

use std::path::Path;
use std::sync::{Arc, Weak};

use parking_lot::{Mutex, RwLock};

use super::StoreError;
use crate::base::{Base, Layer};
use crate::cache::BlockCache;
use crate::events::{Events, Traffic};
use crate::format::record::{BaseIdentity, BaseOptions, BaseRecord, ImageFile, ImageFormat, Validator};
use crate::image::{self, Chain};
use crate::io::{Medium, replace};
use crate::source::{FileSource, Identity, OpenImage, Source, SourceError, SourceErrorKind};

/// Somebody who can get at the files of bases.
pub trait Sources: Send + Sync {
    /// The bytes of a file of this host. Its identity is compared by who asks.
    ///
    /// # Errors
    /// When it cannot be opened.
    fn file(&self, path: &Path) -> Result<FileSource, SourceError>;

    /// The bytes of what lies behind a network, held to its identity. Asks nobody: a server that is down does not
    /// keep a disk from being attached.
    ///
    /// # Errors
    /// When there is no network here.
    fn remote(&self, base: &BaseRecord, file: &ImageFile) -> Result<Arc<dyn Source>, SourceError>;

    /// A file of this host of which a copy is in the store, or is being made.
    ///
    /// # Errors
    /// As [`file`](Self::file), unless all of it is in the store.
    fn copied(&self, base: &BaseRecord, file: &ImageFile) -> Result<Arc<dyn Source>, SourceError>;

    /// What counts the base's traffic.
    fn traffic(&self, base: &BaseRecord) -> Arc<Traffic>;
}

/// Without a network.
impl<O: OpenImage> Sources for O {
    fn file(&self, path: &Path) -> Result<FileSource, SourceError> {
        FileSource::open_with(self, path)
    }

    fn remote(&self, _base: &BaseRecord, _file: &ImageFile) -> Result<Arc<dyn Source>, SourceError> {
        let (why, advice) = ("there is no network here", "run `plyfs serve`");
        Err(SourceError::remote(SourceErrorKind::Unreachable, "open", "a URL", why, advice))
    }

    fn copied(&self, _base: &BaseRecord, file: &ImageFile) -> Result<Arc<dyn Source>, SourceError> {
        Ok(Arc::new(self.file(Path::new(&file.source))?))
    }

    fn traffic(&self, base: &BaseRecord) -> Arc<Traffic> {
        Events::new().base(base.id, &base.name)
    }
}

/// What a file of this host is now.
pub(super) fn identity_of(found: &Identity) -> BaseIdentity {
    let mtime_ns = found.mtime_s * 1_000_000_000 + i64::from(found.mtime_ns);
    BaseIdentity {
        size: found.size,
        validator: Validator::File { mtime_ns, inode: found.inode },
        digest: None,
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

/// One base of a store.
pub struct BaseNode {
    record: BaseRecord,
    options: RwLock<BaseOptions>,
    medium: Arc<dyn Medium>,
    cache: Arc<BlockCache>,
    sources: Arc<dyn Sources>,
    attached: Mutex<Option<Arc<Base>>>,
    /// All that disks may still have, this one and those from before it was let go of.
    handed_out: Mutex<Vec<Weak<Base>>>,
}

impl BaseNode {
    pub(super) fn new(
        record: BaseRecord,
        medium: Arc<dyn Medium>,
        cache: Arc<BlockCache>,
        sources: Arc<dyn Sources>,
    ) -> Self {
        let options = RwLock::new(record.options);
        Self {
            record,
            options,
            medium,
            cache,
            sources,
            attached: Mutex::new(None),
            handed_out: Mutex::default(),
        }
    }

    /// Its number.
    pub fn id(&self) -> u64 {
        self.record.id
    }

    /// What was registered; its options may have changed since ([`BaseNode::options`]).
    pub fn record(&self) -> &BaseRecord {
        &self.record
    }

    /// How it is fetched and kept.
    pub fn options(&self) -> BaseOptions {
        *self.options.read()
    }

    /// Changes how it is fetched and kept, durably. Whoever has it attached goes on with what it was.
    ///
    /// # Errors
    /// What the storage says; nothing has changed then.
    pub fn set_options(&self, change: impl FnOnce(&mut BaseOptions)) -> Result<BaseOptions, StoreError> {
        // Changes come one after the other; who reads in between waits for a sync, at most.
        let mut options = self.options.write();
        let mut new = *options;
        change(&mut new);
        if new != *options {
            let record = BaseRecord { options: new, ..self.record.clone() };
            replace(&*self.medium, "bases", &format!("{}.base", record.id), &record.encode())
                .map_err(StoreError::io(self.object(), "writing its record"))?;
            *options = new;
        }
        Ok(new)
    }

    fn object(&self) -> String {
        format!("base {}", self.record.name)
    }

    /// Bytes of it in the memory cache.
    pub fn cached_bytes(&self) -> u64 {
        self.attached.lock().as_ref().map_or(0, |b| b.cached_bytes())
    }

    /// What is wrong with it, if anything; looks at the files of this host.
    pub fn problem(&self) -> Option<String> {
        match self.attach() {
            Ok(base) => base.check().err().map(|e| e.to_string()),
            Err(e) => Some(e.to_string()),
        }
    }

    /// The base, when somebody has used it.
    pub fn attached(&self) -> Option<Arc<Base>> {
        self.attached.lock().clone()
    }

    /// Gives nothing of it to anybody any more, now and after a restart: its contents do not have their digest.
    ///
    /// # Errors
    /// What the storage says of noting it; it is refused until the next start all the same.
    pub fn refuse(&self) -> Result<(), StoreError> {
        // First what keeps it from being attached again.
        let noted = self.set_options(|options| options.refused = true);
        self.detach();
        self.handed_out.lock().iter().filter_map(Weak::upgrade).for_each(|base| base.refuse());
        noted.map(drop)
    }

    /// Serves it again: its contents have their digest after all.
    ///
    /// # Errors
    /// What the storage says of noting it; it stays refused then.
    pub fn accept(&self) -> Result<(), StoreError> {
        self.set_options(|options| options.refused = false)?;
        self.handed_out.lock().iter().filter_map(Weak::upgrade).for_each(|base| base.accept());
        Ok(())
    }

    /// Drops all of it that is in memory: its source gave other bytes than it should.
    pub fn purge(&self) {
        self.handed_out.lock().iter().filter_map(Weak::upgrade).for_each(|base| base.purge());
    }

    /// Lets go of the sources, so that the next who attaches gets them anew. Who has them keeps them.
    pub fn detach(&self) {
        self.attached.lock().take();
    }

    /// Opens the sources, when they are still what was registered. Asks no server.
    ///
    /// # Errors
    /// `Source` when one cannot be opened, `BaseChanged` when it is another file or was written to.
    pub fn attach(&self) -> Result<Arc<Base>, StoreError> {
        let mut attached = self.attached.lock();
        if let Some(base) = attached.as_ref() {
            return Ok(base.clone());
        }
        let record = BaseRecord { options: self.options(), ..self.record.clone() };
        if record.options.refused {
            return Err(StoreError::BaseChanged {
                object: self.object(),
                why: "its contents do not have the digest that it was registered with; when its source has the right \
                      ones again, run `plyfs base verify`"
                    .into(),
            });
        }
        let mut layers = Vec::with_capacity(1 + record.backing.len());
        let files = std::iter::once(&record.image).chain(&record.backing);
        for (index, file) in files.enumerate() {
            let source = self.open(&record, file)?;
            let chain = if index < record.backing.len() { Chain::OnBacking } else { Chain::Alone };
            let open = |format| image::open(format, source.clone(), file.disk_size, chain);
            let image = reader(file.format).map(open);
            layers.push(Layer { source, image });
        }
        let traffic = self.sources.traffic(&record);
        let (id, name) = (record.id, record.name.clone());
        let base = Arc::new(Base::layered(id, name, record.size(), layers, self.cache.clone(), traffic));
        let mut handed_out = self.handed_out.lock();
        handed_out.retain(|base| base.strong_count() > 0);
        handed_out.push(Arc::downgrade(&base));
        drop(handed_out);
        *attached = Some(base.clone());
        Ok(base)
    }

    fn open(&self, record: &BaseRecord, file: &ImageFile) -> Result<Arc<dyn Source>, StoreError> {
        let wrap = |source| StoreError::Source { object: self.object(), source };
        if matches!(file.identity.validator, Validator::Http { .. }) {
            return self.sources.remote(record, file).map_err(wrap);
        }
        if record.options.hydrate {
            return self.sources.copied(record, file).map_err(wrap);
        }
        let source = self.sources.file(Path::new(&file.source)).map_err(wrap)?;
        match why_changed(file, source.identity()) {
            None => Ok(Arc::new(source)),
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

/// In which way a file of this host is not what was registered.
pub fn why_changed(file: &ImageFile, found: &Identity) -> Option<String> {
    let (now, then) = (identity_of(found), &file.identity);
    let inode = |identity: &BaseIdentity| match identity.validator {
        Validator::File { inode, .. } => Some(inode),
        Validator::Http { .. } => None,
    };
    if now.size != then.size {
        Some(format!("it has {} bytes and had {}", now.size, then.size))
    } else if inode(&now) != inode(then) {
        Some("it is another file than the one registered".into())
    } else if now.validator != then.validator {
        Some("it was modified".into())
    } else {
        None
    }
}
