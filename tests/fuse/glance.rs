//! `plyfs glance sync`: a daemon between a cloud, which a test's server plays, and the directory of a Nova host.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, chown};
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use crate::harness::{TestDaemon, read_at, run, same};
use crate::server::{Object, Reply, Request, Server};

const MIB: usize = 1 << 20;
const NOVA: u32 = 64055;

fn id(number: u64) -> String {
    format!("0f3b1c1e-7b0a-4f3e-9d63-{number:012x}")
}

/// What the server has: records of images, and their data.
#[derive(Default)]
struct Cloud {
    images: BTreeMap<String, (Value, Object)>,
    /// The store gives no ranges.
    without_ranges: bool,
    /// keystone refuses the password.
    refuses: bool,
}

impl Cloud {
    fn answer(&self, request: &Request, here: &str) -> Reply {
        let json = |status, value: &Value, more: Vec<(String, String)>| {
            let lines = vec![("Content-Type".into(), "application/json".into())];
            Reply::Status(status, [lines, more].concat(), value.to_string().into())
        };
        let (path, query) = request.target.split_once('?').unwrap_or((&request.target, ""));
        if path == "/v3/auth/tokens" {
            if self.refuses {
                return Reply::status(401);
            }
            let endpoint = json!({"interface": "public", "region_id": "R", "url": here});
            let token = json!({"token": {
                "issued_at": "2026-11-30T10:00:00Z", "expires_at": "2026-11-30T11:00:00Z",
                "catalog": [{"type": "image", "endpoints": [endpoint]}],
            }});
            return json(201, &token, vec![("X-Subject-Token".into(), "token".into())]);
        }
        if request.header("x-auth-token") != Some("token") {
            return Reply::status(401);
        }
        if path == "/v2/images" {
            return json(200, &self.page(query), Vec::new());
        }
        let (image, file) = match path.trim_start_matches("/v2/images/").split_once('/') {
            Some((image, "file")) => (image, true),
            _ => (path.trim_start_matches("/v2/images/"), false),
        };
        match (self.images.get(image), file) {
            (None, _) => Reply::status(404),
            (Some((record, _)), false) => json(200, record, Vec::new()),
            (Some(_), true) if self.without_ranges => {
                let text = "Getting images randomly from this store is not supported.";
                Reply::Status(400, Vec::new(), text.into())
            }
            (Some((record, object)), true) => data(object, record["checksum"].as_str().unwrap(), request),
        }
    }

    /// Two images a page, by ID.
    fn page(&self, query: &str) -> Value {
        let of = |key: &str| query.split('&').find_map(|pair| pair.strip_prefix(key)).unwrap_or_default();
        assert!(of("status=") == "active" && of("sort=") == "id%3Aasc", "{query}");
        let is_hidden = of("os_hidden=") == "true";
        let marker = of("marker=");
        let wanted = |record: &Value| {
            record["status"] == "active"
                && (record["os_hidden"] == true) == is_hidden
                && record["id"].as_str().unwrap() > marker
        };
        let all: Vec<&Value> =
            self.images.values().map(|(record, _)| record).filter(|record| wanted(record)).collect();
        let mut page = json!({"images": all.iter().take(2).collect::<Vec<_>>()});
        if all.len() > 2 {
            // A place that must not be gone to.
            page["next"] = "http://attacker.example.org/v2/images?marker=x".into();
        }
        page
    }
}

/// A range of an image as Glance gives it: without validators, with the digest of the whole.
fn data(object: &Object, md5: &str, request: &Request) -> Reply {
    let (first, last) = request.range().expect("only ranges are asked for");
    let last = last.min(object.bytes.len() as u64 - 1);
    let lines = vec![
        ("Content-Type".into(), "application/octet-stream".into()),
        ("Content-Range".into(), format!("bytes {first}-{last}/{}", object.bytes.len())),
        ("Content-MD5".into(), md5.into()),
    ];
    Reply::Status(206, lines, object.bytes[first as usize..=last as usize].to_vec())
}

/// A daemon, its cloud `test`, and the directory of instances, which belongs to Nova.
pub struct House {
    pub daemon: TestDaemon,
    server: Server,
    cloud: Arc<Mutex<Cloud>>,
    instances: PathBuf,
}

impl House {
    pub fn new() -> Self {
        let mut daemon = TestDaemon::unstarted("/var/tmp");
        let server = Server::start(Object::new(1));
        let cloud = Arc::<Mutex<Cloud>>::default();
        let (answering, here) = (cloud.clone(), server.url(""));
        server.on(move |request| answering.lock().unwrap().answer(request, &here));
        let clouds = format!(
            "clouds:\n  test:\n    auth:\n      auth_url: {}\n      username: u\n      password: p\n      \
             project_name: p\n      user_domain_id: default\n      project_domain_id: default\n",
            server.url("")
        );
        fs::write(daemon.path("clouds.yaml"), clouds).unwrap();
        let file = daemon.path("clouds.yaml").display().to_string();
        let config =
            format!("[[http.clouds]]\nname = \"test\"\nfile = \"{file}\"\n[mount]\nbase_mode = \"0444\"\n");
        fs::write(daemon.path("plyfs.toml"), config).unwrap();
        daemon.try_start(&["--config", daemon.path("plyfs.toml").to_str().unwrap()]).unwrap();
        let instances = daemon.path("instances");
        fs::create_dir(&instances).unwrap();
        chown(&instances, Some(NOVA), Some(NOVA)).unwrap();
        Self { daemon, server, cloud, instances }
    }

    pub fn add(&self, number: u64, object: &Object) -> String {
        self.add_as(number, object, json!({}))
    }

    fn add_as(&self, number: u64, object: &Object, change: Value) -> String {
        let id = id(number);
        let mut record = json!({
            "id": id, "name": format!("image {number}"), "status": "active", "size": object.bytes.len(),
            "os_hash_algo": "sha512", "os_hash_value": format!("{number:0128x}"), "checksum": format!("{number:032x}"),
            "disk_format": "raw", "container_format": "bare", "os_hidden": false,
        });
        for (key, value) in change.as_object().unwrap() {
            record[key] = value.clone();
        }
        self.cloud.lock().unwrap().images.insert(id.clone(), (record, object.clone()));
        id
    }

    fn arguments(&self, more: &[&str]) -> Vec<String> {
        let instances = self.instances.to_str().unwrap();
        let all =
            [&["--json", "glance", "sync", "--instances", instances, "--keep-unused", "0s"], more].concat();
        all.into_iter().map(str::to_owned).collect()
    }

    /// Status and summary of a pass.
    fn sync(&self, more: &[&str]) -> (bool, Value) {
        let output = self.daemon.command().args(self.arguments(more)).output().unwrap();
        let summary = serde_json::from_slice(&output.stdout);
        let said = String::from_utf8_lossy(&output.stderr);
        (output.status.success(), summary.unwrap_or_else(|error| panic!("{error}: {said}")))
    }

    #[track_caller]
    fn counts(&self, wanted: &[(&str, u64)]) -> Value {
        let (ok, summary) = self.sync(&[]);
        for key in ["linked", "present", "removed", "kept", "skipped", "busy", "failed"] {
            let count = wanted.iter().find(|(of, _)| *of == key).map_or(0, |(_, count)| *count);
            assert_eq!(summary[key], count, "{key}: {summary:#}");
        }
        assert_eq!(ok, summary["failed"] == 0);
        summary
    }

    fn entry(&self, id: &str) -> PathBuf {
        let sum = run(Command::new("sh").arg("-c").arg(format!("printf %s {id} | sha1sum")));
        self.instances.join("_base").join(&sum[..40])
    }

    fn base(&self, id: &str) -> PathBuf {
        self.daemon.mount().join(format!("bases/g-{id}.raw"))
    }

    fn why(summary: &Value, id: &str) -> String {
        let images = summary["images"].as_array().unwrap();
        let found = images.iter().find(|image| image["image"] == id);
        found.unwrap_or_else(|| panic!("{id}: {summary:#}"))["why"].as_str().unwrap_or_default().to_owned()
    }
}

#[test]
fn every_active_image_is_linked_once_for_its_first_bytes_alone() {
    let house = House::new();
    let objects: Vec<Object> = (1..=5).map(|seed| Object::seeded(2 * MIB, seed)).collect();
    let ids: Vec<String> = (1..).zip(&objects).map(|(number, object)| house.add(number, object)).collect();
    let hidden = house.add_as(6, &objects[0], json!({"os_hidden": true}));
    house.add_as(7, &objects[0], json!({"status": "queued"}));
    house.add_as(8, &objects[0], json!({"container_format": "ova"}));
    house.add_as(9, &objects[0], json!({"os_hash_value": null}));
    let (ok, planned) = house.sync(&["--dry-run"]);
    assert!(ok && planned["linked"] == 6 && planned["skipped"] == 2, "{planned:#}");
    assert!(!house.instances.join("_base").exists());
    assert_eq!(house.daemon.json(&["base", "ls"]), json!([]));
    house.counts(&[("linked", 6), ("skipped", 2)]);
    for (id, object) in ids.iter().zip(&objects).chain([(&hidden, &objects[0])]) {
        let entry = house.entry(id);
        assert_eq!(fs::read_link(&entry).unwrap(), house.base(id));
        assert_eq!(fs::symlink_metadata(&entry).unwrap().uid(), NOVA);
        assert!(fs::metadata(&entry).unwrap().blocks() * 512 <= 128 << 10, "the first bytes alone");
        let age = SystemTime::now().duration_since(fs::metadata(&entry).unwrap().modified().unwrap());
        assert!(age.unwrap_or_default() < Duration::from_secs(600), "the image counts as used now");
        same(
            &read_at(&File::open(&entry).unwrap(), 1_000_000, 70_000),
            &object.bytes[1_000_000..][..70_000],
            id,
        );
    }
    let shown = house.daemon.json(&["base", "show", &format!("g-{}", ids[0])]);
    assert_eq!(shown["source"], format!("glance+cloud://test/{}", ids[0]));
    assert_eq!(shown["sha512"], format!("{:0128x}", 1));
    assert!(fs::metadata(house.instances.join("locks")).unwrap().uid() == NOVA);
    // A second pass reads the lists and nothing else.
    house.server.forget_requests();
    house.counts(&[("present", 6), ("skipped", 2)]);
    let asked: Vec<String> = house.server.requests().into_iter().map(|request| request.target).collect();
    assert!(asked.iter().all(|target| target.starts_with("/v2/images?")), "{asked:?}");
}

#[test]
fn what_goes_wrong_with_one_image_does_not_stop_the_others() {
    let house = House::new();
    let good = Object::seeded(MIB, 1);
    let begins = |bytes: &[u8]| {
        let mut all = good.bytes.to_vec();
        all[..bytes.len()].copy_from_slice(bytes);
        Object { bytes: Arc::new(all), ..good.clone() }
    };
    let first = house.add(1, &good);
    let qcow2 = house.add(2, &begins(b"QFI\xfb\0\0\0\x03"));
    let luks = house.add(3, &begins(b"LUKS\xba\xbe\0\x01"));
    let other = house.add(4, &good);
    let downloaded = house.add(5, &good);
    let elsewhere = house.add(6, &good);
    let last = house.add(7, &good);
    // Names that an operator uses, and a file that Nova has.
    fs::write(house.daemon.path("x.img"), vec![1; MIB]).unwrap();
    house.daemon.ok(&["base", "add", &format!("g-{other}"), house.daemon.path("x.img").to_str().unwrap()]);
    fs::create_dir(house.instances.join("_base")).unwrap();
    fs::write(house.entry(&downloaded), "Nova's").unwrap();
    std::os::unix::fs::symlink("/images/golden.raw", house.entry(&elsewhere)).unwrap();
    let summary = house.counts(&[("linked", 2), ("failed", 3), ("skipped", 2)]);
    assert!(House::why(&summary, &qcow2).contains("qcow2"), "{summary:#}");
    assert!(House::why(&summary, &luks).contains("begins as a luks image"), "{summary:#}");
    assert!(House::why(&summary, &other).contains("x.img"), "{summary:#}");
    for id in [&first, &last] {
        assert_eq!(fs::read_link(house.entry(id)).unwrap(), house.base(id));
    }
    for id in [&qcow2, &luks, &other] {
        assert!(!house.entry(id).is_symlink());
    }
    assert_eq!(fs::read(house.entry(&downloaded)).unwrap(), b"Nova's");
    assert_eq!(fs::read_link(house.entry(&elsewhere)).unwrap(), PathBuf::from("/images/golden.raw"));
    let instances = house.instances.to_str().unwrap();
    let said = house.daemon.fails(&["glance", "sync", "--instances", instances]);
    assert!(said.contains("3 of 7 failed"), "{said}");
    // A store without ranges is left to Nova; so are all images while keystone refuses.
    house.cloud.lock().unwrap().without_ranges = true;
    let random = house.add(8, &good);
    let (_, summary) = house.sync(&[]);
    assert!(House::why(&summary, &random).contains("no random access"), "{summary:#}");
    assert_eq!(summary["skipped"], 4, "and the one that was no base before: {summary:#}");
    assert!(house.daemon.fails(&["glance", "sync", "--cloud", "lab"]).contains("it has: test"));
    assert!(house.daemon.fails(&["glance", "sync", "--instances", "/nonexistent"]).contains("--instances"));
}

#[test]
fn an_image_that_is_gone_stays_until_nothing_stands_on_it() {
    let house = House::new();
    let object = Object::seeded(MIB, 1);
    let ids: Vec<String> = (1..=4).map(|number| house.add(number, &object)).collect();
    house.counts(&[("linked", 4)]);
    let [free, overlaid, cloned, open] = &ids[..] else { panic!() };
    fs::create_dir(house.instances.join("vm1")).unwrap();
    let overlay = house.instances.join("vm1/disk");
    let base = house.entry(overlaid);
    run(Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
        .arg(&base)
        .arg(&overlay));
    house.daemon.ok(&["disk", "create", "vm2", "--base", &format!("g-{cloned}")]);
    let reader = File::open(house.base(open)).unwrap();
    house.cloud.lock().unwrap().images.get_mut(free).unwrap().0["status"] = "deactivated".into();
    for id in &ids[1..] {
        house.cloud.lock().unwrap().images.remove(id);
    }
    let summary = house.counts(&[("removed", 1), ("kept", 3)]);
    assert!(House::why(&summary, overlaid).contains("vm1/disk stands on it"), "{summary:#}");
    assert!(!house.entry(free).is_symlink() && !house.base(free).exists());
    for id in &ids[1..] {
        assert_eq!(fs::read_link(house.entry(id)).unwrap(), house.base(id));
    }
    fs::remove_file(&overlay).unwrap();
    house.daemon.ok(&["disk", "rm", "vm2"]);
    drop(reader);
    // The kernel closes files after their close(2).
    crate::harness::until("all are removed", || {
        let (_, summary) = house.sync(&[]);
        (summary["kept"] == 0).then_some(())
    });
    assert_eq!(house.daemon.json(&["base", "ls"]), json!([]));
    assert_eq!(fs::read_dir(house.instances.join("_base")).unwrap().count(), 0);
    // It is active again.
    house.cloud.lock().unwrap().images.get_mut(free).unwrap().0["status"] = "active".into();
    house.counts(&[("linked", 1)]);
    // A base that was removed by hand leaves a link to nothing: it is made again. Of an image that is gone, it goes.
    house.daemon.ok(&["base", "rm", &format!("g-{free}")]);
    assert!(!house.entry(free).exists());
    house.counts(&[("present", 1)]);
    assert!(house.entry(free).exists());
    house.daemon.ok(&["base", "rm", &format!("g-{free}")]);
    house.cloud.lock().unwrap().images.clear();
    house.counts(&[]);
    assert!(!house.entry(free).is_symlink());
}

/// What a list that is not complete does not have is not gone.
#[test]
fn a_cloud_that_does_not_answer_loses_no_image() {
    let house = House::new();
    let image = house.add(1, &Object::seeded(MIB, 1));
    house.counts(&[("linked", 1)]);
    // The next worker has no token.
    house.daemon.kill_worker();
    house.cloud.lock().unwrap().refuses = true;
    let summary = house.counts(&[("failed", 1)]);
    let why = summary["images"][0]["why"].as_str().unwrap();
    assert!(why.contains("401") && summary["images"][0]["image"].is_null(), "{summary:#}");
    assert_eq!(fs::read_link(house.entry(&image)).unwrap(), house.base(&image));
    house.cloud.lock().unwrap().refuses = false;
    house.counts(&[("present", 1)]);
}

/// Nova holds its lock for as long as it downloads an image.
#[test]
fn an_image_that_nova_works_on_is_left_for_the_next_pass() {
    let house = House::new();
    let image = house.add(1, &Object::seeded(MIB, 1));
    fs::create_dir(house.instances.join("locks")).unwrap();
    let name = house.entry(&image).file_name().unwrap().to_str().unwrap().to_owned();
    let lock = house.instances.join(format!("locks/nova-{name}"));
    let script = "import fcntl,sys,time\nfile = open(sys.argv[1], 'a')\n\
                  fcntl.lockf(file, fcntl.LOCK_EX)\nprint('held', flush=True)\ntime.sleep(600)";
    let mut nova = Command::new("python3");
    let nova = nova.args(["-c", script]).arg(&lock).stdout(std::process::Stdio::piped());
    let mut nova = nova.spawn().unwrap();
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(nova.stdout.as_mut().unwrap()), &mut line)
        .unwrap();
    house.counts(&[("busy", 1)]);
    assert!(!house.entry(&image).is_symlink());
    nova.kill().unwrap();
    nova.wait().unwrap();
    house.counts(&[("linked", 1)]);
}
