//! A registered base, and the files behind it once somebody needs them.

use std::path::Path;
use std::sync::{Arc, Weak};

use parking_lot::{Mutex, RwLock};

use super::StoreError;
use super::records::RECORD_LIMIT;
use crate::base::{Base, Layer};
use crate::cache::BlockCache;
use crate::events::{Events, Traffic};
use crate::format::layout;
use crate::format::record::{BaseOptions, BaseRecord, ImageFile, ImageFormat, Moved};
use crate::image::{self, Chain};
use crate::io::{Medium, replace};
use crate::sabotage::{Sabotage, sabotaged};
use crate::source::{FileSource, OpenImage, Source, SourceError, SourceErrorKind, compare};

/// Somebody who can get at the files of bases.
pub trait Sources: Send + Sync {
    /// The bytes of a file of this host. Its identity is compared by who asks.
    ///
    /// # Errors
    /// When it cannot be opened.
    fn file(&self, path: &Path) -> Result<FileSource, SourceError>;

    /// The bytes of a file that is kept block by block ([`BaseRecord::keeps`]), held to its identity: what lies behind a
    /// network, or a file of this host of which a copy is made. Asks no server: one that is down does not keep a disk from
    /// being attached.
    ///
    /// # Errors
    /// When there is no network here; of a file of this host as [`file`](Self::file), unless all of it is in the store.
    fn kept(&self, base: &BaseRecord, file: &ImageFile) -> Result<Arc<dyn Source>, SourceError>;

    /// What counts the base's traffic.
    fn traffic(&self, base: &BaseRecord) -> Arc<Traffic>;
}

/// Without a network.
impl<O: OpenImage> Sources for O {
    fn file(&self, path: &Path) -> Result<FileSource, SourceError> {
        FileSource::open_with(self, path)
    }

    fn kept(&self, _base: &BaseRecord, file: &ImageFile) -> Result<Arc<dyn Source>, SourceError> {
        if file.is_local() {
            return Ok(Arc::new(self.file(Path::new(&file.source))?));
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
struct Attached {
    base: Option<Arc<Base>>,
    /// How often it was let go of: what is being attached meanwhile is attached anew.
    detached: u64,
}

/// One base of a store.
pub struct BaseNode {
    record: BaseRecord,
    options: RwLock<BaseOptions>,
    /// Taken inside `options`.
    moved: RwLock<Vec<Moved>>,
    medium: Arc<dyn Medium>,
    cache: Arc<BlockCache>,
    sources: Arc<dyn Sources>,
    /// Held while its files are opened, which may take as long as their filesystem hangs.
    attaching: Mutex<()>,
    /// Never held through a system call.
    attached: Mutex<Attached>,
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
        let (options, moved) = (RwLock::new(record.options), RwLock::new(record.moved.clone()));
        Self {
            record,
            options,
            moved,
            medium,
            cache,
            sources,
            attaching: Mutex::new(()),
            attached: Mutex::default(),
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
            self.write(new, &self.moved.read())?;
            *options = new;
        }
        Ok(new)
    }

    /// Its record with what may have changed since it was registered.
    pub fn current(&self) -> BaseRecord {
        let options = self.options.read();
        BaseRecord { options: *options, moved: self.moved.read().clone(), ..self.record.clone() }
    }

    /// Notes durably where one of its files (0 is the image) is from now on, and that it is not given up any more.
    ///
    /// # Errors
    /// `Invalid` when there is no such file or the record gets too long; what the storage says. Nothing has changed
    /// then.
    pub fn set_urls(&self, file: u8, urls: Vec<String>) -> Result<(), StoreError> {
        let invalid = |why: &str| Err(StoreError::invalid(self.object(), why));
        if usize::from(file) > self.record.backing.len() {
            return invalid("it has no such file");
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
            let why = "its paths and URLs are too long in all; leave some away";
            return Err(StoreError::invalid(self.object(), why));
        }
        replace(&*self.medium, layout::BASES, &layout::base_record(record.id), &bytes)
            .map_err(StoreError::io(self.object(), "writing its record"))
    }

    /// The daemon ends cleanly: the request that registered it is answered, and an older plyfs reads the record again.
    pub(super) fn forget_token(&self) {
        if self.record.token.is_none() {
            return;
        }
        let record = BaseRecord { token: None, ..self.current() };
        let written =
            replace(&*self.medium, layout::BASES, &layout::base_record(record.id), &record.encode());
        if let Err(error) = written {
            tracing::warn!(base = record.name, %error, "its record keeps the note of a request");
        }
    }

    fn object(&self) -> String {
        format!("base {}", self.record.name)
    }

    /// Bytes of it in the memory cache.
    pub fn cached_bytes(&self) -> u64 {
        self.attached().map_or(0, |b| b.cached_bytes())
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
        self.attached.lock().base.clone()
    }

    /// Gives nothing of it to anybody any more, now and after a restart: its contents do not have their digest.
    ///
    /// # Errors
    /// What the storage says of noting it; it is refused until the next start all the same.
    pub fn refuse(&self) -> Result<(), StoreError> {
        // First what keeps it from being attached again.
        let noted = match sabotaged(Sabotage::RefusalNotNoted) {
            true => Ok(self.options()),
            false => self.set_options(|options| options.refused = true),
        };
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
        let mut attached = self.attached.lock();
        attached.detached += 1;
        attached.base = None;
    }

    /// Opens the sources, when they are still what was registered. Asks no server.
    ///
    /// # Errors
    /// `Source` when one cannot be opened, `BaseChanged` when it is another file or was written to.
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
            // Who refuses it or has it opened anew lets go of it after that is noted: seen here, or in the list.
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
                      ones again, run `plyfs base verify`"
                    .into(),
            });
        }
        let mut layers = Vec::with_capacity(1 + record.backing.len());
        for (index, file) in record.files().enumerate() {
            let source = self.open(&record, file)?;
            let chain = if index < record.backing.len() { Chain::OnBacking } else { Chain::Alone };
            let open = |format| image::open(format, source.clone(), file.disk_size, chain);
            let image = reader(file.format).map(open);
            layers.push(Layer { source, image });
        }
        let traffic = self.sources.traffic(&record);
        let (id, name) = (record.id, record.name.clone());
        Ok(Arc::new(Base::layered(id, name, record.size(), layers, self.cache.clone(), traffic)))
    }

    fn open(&self, record: &BaseRecord, file: &ImageFile) -> Result<Arc<dyn Source>, StoreError> {
        let wrap = |source| StoreError::Source { object: self.object(), source };
        if record.keeps(file) {
            return self.sources.kept(record, file).map_err(wrap);
        }
        let source = self.sources.file(Path::new(&file.source)).map_err(wrap)?;
        match compare(&file.identity, &source.found(), record.options.strictness).difference() {
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
