use std::path::{Path, PathBuf};
use std::time::Duration;

use super::host::{default_store_for, effective_uid, total_memory_in};
use super::size::{MAX_SIZE, SizeError, format_size, parse_size};
use super::{
    CloudConfig, Config, ConfigError, CredentialConfig, EncryptionConfig, HttpConfig, HydrateConfig,
    LocationKind, LogConfig, LogFormat, MetricsConfig, NotifyConfig, Overrides, SeccompMode, SecurityConfig,
    TraceConfig, TrashConfig, UnusedBasesConfig, default_cache_memory, file,
};

fn load(toml: &str, flags: Overrides) -> Result<Config, ConfigError> {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join("plyfs.toml");
    std::fs::write(&path, toml).expect("write the file");
    Config::load(Some(&path), flags)
}

fn with_store() -> Overrides {
    Overrides { store: Some("/srv/plyfs".into()), ..Overrides::default() }
}

fn refusal(toml: &str) -> String {
    let message = load(toml, with_store()).expect_err(toml).to_string();
    assert!(!message.contains('\n'), "more than one line: {message:?}");
    message
}

#[test]
fn sizes_that_are_accepted() {
    for (text, bytes) in [
        ("0", 0),
        ("1", 1),
        ("4096", 4096),
        ("4096B", 4096),
        ("64K", 64 << 10),
        ("64k", 64 << 10),
        ("64KiB", 64 << 10),
        ("64KB", 64 << 10),
        (" 20G ", 20 << 30),
        ("20gib", 20 << 30),
        ("1T", 1 << 40),
        ("2P", 2 << 50),
        ("7E", 7 << 60),
        ("007M", 7 << 20),
        ("9223372036854775807", MAX_SIZE),
    ] {
        assert_eq!(parse_size(text), Ok(bytes), "{text:?}");
    }
}

#[test]
fn sizes_that_are_refused() {
    for (text, why) in [
        ("", SizeError::Empty),
        ("  ", SizeError::Empty),
        ("-5", SizeError::Negative),
        ("-5G", SizeError::Negative),
        ("1.5G", SizeError::Fraction),
        ("1,5", SizeError::Fraction),
        (".5", SizeError::Fraction),
        ("G", SizeError::NotANumber),
        ("+5", SizeError::NotANumber),
        ("abc", SizeError::NotANumber),
        ("0x10", SizeError::Unit),
        ("20X", SizeError::Unit),
        ("20GG", SizeError::Unit),
        ("20iB", SizeError::Unit),
        ("20 G x", SizeError::Unit),
        ("20Bi", SizeError::Unit),
        ("20é", SizeError::Unit),
        ("٣", SizeError::NotANumber),
        ("8E", SizeError::TooLarge),
        ("9223372036854775808", SizeError::TooLarge),
        ("18446744073709551615", SizeError::TooLarge),
        ("99999999999999999999999", SizeError::TooLarge),
        ("18014398509481985K", SizeError::TooLarge),
    ] {
        assert_eq!(parse_size(text), Err(why), "{text:?}");
    }
}

#[test]
fn sizes_for_people() {
    for (bytes, text) in [
        (0, "0"),
        (1023, "1023"),
        (1024, "1K"),
        (1536, "1.5K"),
        (4096, "4K"),
        ((1 << 20) - 1, "1.0M"),
        (20 << 30, "20G"),
        ((20 << 30) + 1, "20.0G"),
        (1 << 40, "1T"),
        (MAX_SIZE, "8.0E"),
        (u64::MAX, "16.0E"),
    ] {
        assert_eq!(format_size(bytes), text, "{bytes}");
    }
}

#[test]
fn defaults() {
    let config = load("", with_store()).expect("an empty file is fine");
    assert_eq!(config.store, Path::new("/srv/plyfs"));
    assert_eq!(config.mount, Path::new("/srv/plyfs/mnt"));
    assert_eq!(config.base_mode, 0o400);
    assert_eq!(config.cache_disk, None);
    assert_eq!(config.reserve, None);
    assert_eq!((config.fuse_threads, config.io_threads), (4, 32));
    assert_eq!(config.runtime_dir, None);
    assert_eq!((config.map_memory, config.map_memory_per_disk), (None, None));
    assert_eq!(config.log, LogConfig { level: "info".into(), format: LogFormat::Auto });
    assert_eq!(config.allow_other, super::host::is_root());
    let security = config.security;
    assert!(security.capabilities && security.landlock && !security.core_dumps);
    assert!(security.network);
    assert_eq!((security.seccomp, security.base_dirs), (SeccompMode::On, Vec::new()));
    assert_eq!(config.http, HttpConfig::default());
    config.http.validate().expect("the defaults are within the bounds");
    assert_eq!(config.metrics, MetricsConfig { listen: None, series: 100 });
    let trace = config.trace;
    assert!(trace.auto && trace.prefetch);
    assert_eq!((trace.idle_seconds, trace.longest_seconds), (30, 300));
}

#[test]
fn metrics_are_served_on_loopback_unless_another_address_is_written() {
    let address = |listen: &str| {
        let listen = Some(listen.to_owned());
        MetricsConfig { listen, ..MetricsConfig::default() }.address().map(|address| address.to_string())
    };
    assert_eq!(address("9464").as_deref(), Some("127.0.0.1:9464"));
    assert_eq!(address("0.0.0.0:9464").as_deref(), Some("0.0.0.0:9464"));
    assert_eq!(address("[::1]:9464").as_deref(), Some("[::1]:9464"));
    assert_eq!((address("0"), address("host:1"), MetricsConfig::default().address()), (None, None, None));
}

#[test]
fn default_cache_is_an_eighth_of_memory_within_bounds() {
    assert_eq!(default_cache_memory(None), 64 << 20);
    assert_eq!(default_cache_memory(Some(256 << 20)), 64 << 20);
    assert_eq!(default_cache_memory(Some(8 << 30)), 1 << 30);
    assert_eq!(default_cache_memory(Some(1 << 40)), 16 << 30);
}

#[test]
fn every_key_of_the_file_is_read() {
    let config = load(
        r#"
        [store]
        path = "/a"
        reserve = "32M"
        [mount]
        path = "/b"
        allow_other = true
        base_mode = "0444"
        [cache]
        memory = "512M"
        disk_bases = 5
        disk_free = "3G"
        disk = 1073741824
        [fuse]
        threads = 8
        [io]
        threads = 64
        [runtime]
        dir = "/run/plyfs"
        map_memory = "2G"
        map_memory_per_disk = "64M"
        [log]
        level = "debug"
        format = "json"
        [security]
        capabilities = false
        landlock = true
        seccomp = "log"
        core_dumps = true
        base_dirs = ["/images", "/srv/images"]
        nbd_socket_dirs = ["/run/nbd"]
        network = false
        [hydrate]
        auto = true
        rate = "2M"
        [http]
        ca_file = "/etc/ca.pem"
        max_requests = 8
        max_rate = "100M"
        connect_timeout = "2500ms"
        stall_timeout = "1m"
        min_rate = "1K"
        allow = ["images.internal", ".corp.example", "10.0.0.0/8"]
        user_agent = "plyfs at home"
        [[http.credentials]]
        url = "https://images.example.org/private/"
        bearer_file = "/secrets/token"
        renew = "10m"
        [[http.credentials]]
        url = "http://other:8080"
        command = ["/usr/bin/token", "now"]
        [trace]
        auto = false
        prefetch = false
        idle_seconds = 7
        longest_seconds = 90
        [metrics]
        listen = "[::1]:9464"
        series = 20
        [encryption]
        key_dirs = ["/etc/plyfs/keys"]
        key_command = ["/usr/bin/key", "get"]
        [notify]
        command = ["/usr/bin/notify", "now"]
        events = ["base.hit"]
        [[http.clouds]]
        name = "prod"
        [[http.clouds]]
        name = "lab.2"
        file = "/srv/clouds.yaml"
        locations = ["http", "swift"]
        [page]
        listen = "192.0.2.1:8080"
        remote = true
        [export]
        http = "10.0.0.2:7070"
        rate = "1G"
        [trash]
        grace = "7d"
        [bases]
        unused_age = "1h"
        unused_limit = "5G"
        "#,
        Overrides::default(),
    )
    .expect("valid");
    let expected = Config {
        store: "/a".into(),
        reserve: Some(32 << 20),
        mount: "/b".into(),
        allow_other: true,
        base_mode: 0o444,
        cache_memory: 512 << 20,
        cache_disk: Some(1 << 30),
        cache_disk_bases: Some(5),
        cache_disk_free: Some(3 << 30),
        fuse_threads: 8,
        io_threads: 64,
        runtime_dir: Some("/run/plyfs".into()),
        map_memory: Some(2 << 30),
        map_memory_per_disk: Some(64 << 20),
        log: LogConfig { level: "debug".into(), format: LogFormat::Json },
        security: SecurityConfig {
            capabilities: false,
            landlock: true,
            seccomp: SeccompMode::Log,
            core_dumps: true,
            base_dirs: vec!["/images".into(), "/srv/images".into()],
            nbd_socket_dirs: vec!["/run/nbd".into()],
            network: false,
        },
        http: HttpConfig {
            ca_file: Some("/etc/ca.pem".into()),
            max_requests: 8,
            max_rate: Some(100 << 20),
            connect_timeout: Duration::from_millis(2500),
            stall_timeout: Duration::from_secs(60),
            min_rate: 1 << 10,
            allow: vec!["images.internal".into(), ".corp.example".into(), "10.0.0.0/8".into()],
            s3: Vec::new(),
            user_agent: "plyfs at home".into(),
            credentials: vec![
                CredentialConfig {
                    url: "https://images.example.org/private/".into(),
                    bearer_file: Some("/secrets/token".into()),
                    basic_file: None,
                    header_file: None,
                    command: None,
                    renew: Some(Duration::from_secs(600)),
                },
                CredentialConfig {
                    url: "http://other:8080".into(),
                    bearer_file: None,
                    basic_file: None,
                    header_file: None,
                    command: Some(vec!["/usr/bin/token".into(), "now".into()]),
                    renew: None,
                },
            ],
            clouds: vec![
                CloudConfig {
                    name: "prod".into(),
                    file: "/etc/openstack/clouds.yaml".into(),
                    locations: vec![],
                },
                CloudConfig {
                    name: "lab.2".into(),
                    file: "/srv/clouds.yaml".into(),
                    locations: vec![LocationKind::Http, LocationKind::Swift],
                },
            ],
        },
        hydrate: HydrateConfig { auto: true, rate: Some(2 << 20) },
        trace: TraceConfig { auto: false, prefetch: false, idle_seconds: 7, longest_seconds: 90 },
        metrics: MetricsConfig { listen: Some("[::1]:9464".into()), series: 20 },
        encryption: EncryptionConfig {
            key_dirs: vec!["/etc/plyfs/keys".into()],
            key_command: Some(vec!["/usr/bin/key".into(), "get".into()]),
        },
        notify: NotifyConfig {
            url: None,
            command: Some(vec!["/usr/bin/notify".into(), "now".into()]),
            events: vec!["base.hit".into()],
        },
        page: crate::config::PageConfig { listen: Some("192.0.2.1:8080".into()), remote: true },
        export: crate::config::ExportConfig { http: Some("10.0.0.2:7070".into()), rate: 1 << 30 },
        trash: TrashConfig { grace: Duration::from_secs(7 * 86_400) },
        bases: UnusedBasesConfig { unused_age: Some(Duration::from_secs(3600)), unused_limit: Some(5 << 30) },
    };
    assert_eq!(config, expected);
}

#[test]
fn flags_override_the_file() {
    let flags = Overrides {
        store: Some("/f".into()),
        mount: Some("relative".into()),
        cache_memory: Some(2 << 20),
        cache_disk: Some(3 << 20),
        allow_other: Some(false),
        trash_grace: Some(Duration::from_secs(60)),
        base_unused_age: Some(Duration::from_secs(61)),
        base_unused_limit: Some(4 << 20),
        export_http: Some("127.0.0.1:7070".into()),
        log_level: Some("warn".into()),
        log_format: Some(LogFormat::Human),
    };
    let toml = "store.path = '/a'\nmount.path = '/b'\nmount.allow_other = true\ncache.memory = '1G'\n\
                cache.disk = '1G'\nlog.level = 'trace'\nlog.format = 'json'\n\
                trash.grace = '1d'\nbases.unused_age = '1d'\nbases.unused_limit = 0\n";
    let config = load(toml, flags).expect("valid");
    assert_eq!(config.store, Path::new("/f"));
    assert_eq!(config.mount, std::env::current_dir().expect("current directory").join("relative"));
    assert_eq!((config.cache_memory, config.cache_disk), (2 << 20, Some(3 << 20)));
    assert!(!config.allow_other);
    assert_eq!(config.trash.grace, Duration::from_secs(60));
    assert_eq!(config.bases.unused_age, Some(Duration::from_secs(61)));
    assert_eq!(config.bases.unused_limit, Some(4 << 20));
    assert_eq!(config.log, LogConfig { level: "warn".into(), format: LogFormat::Human });
}

#[test]
fn unknown_keys_are_refused_with_their_line() {
    for (toml, line, key) in [
        ("typo = 1", 1, "typo"),
        ("[store]\npath = '/a'\n[cahce]\nmemory = 1", 3, "cahce"),
        ("[cache]\nmemory = '1G'\nmemroy = 1", 3, "memroy"),
        ("[log]\ncolour = true", 2, "colour"),
        ("[fuse]\nthread = 4", 2, "thread"),
    ] {
        let message = refusal(toml);
        assert!(message.contains(&format!("line {line}:")), "{message}");
        assert!(message.contains(&format!("unknown field `{key}`")), "{message}");
    }
}

#[test]
fn values_out_of_bounds_are_refused() {
    for (toml, part) in [
        ("cache.memory = '1023K'", "cache.memory"),
        ("cache.memory = 0", "cache.memory"),
        ("cache.memory = -1", "negative"),
        ("cache.memory = '20X'", "unit is not known"),
        ("cache.memory = true", "a size"),
        ("cache.disk = 5", "cache.disk"),
        ("store.reserve = '1023K'", "store.reserve: 1023K is out of bounds"),
        ("store.reserve = '65G'", "store.reserve"),
        ("runtime.map_memory = '1023K'", "runtime.map_memory: 1023K is out of bounds; give at least 1M"),
        ("runtime.map_memory_per_disk = '63K'", "runtime.map_memory_per_disk"),
        ("fuse.threads = 0", "fuse.threads: 0 is out of bounds; give 1 to 64"),
        ("fuse.threads = 65", "fuse.threads"),
        ("fuse.threads = -1", "line 1"),
        ("io.threads = 0", "io.threads"),
        ("io.threads = 1025", "io.threads"),
        ("mount.base_mode = '0600'", "0600 has bits"),
        ("mount.base_mode = '1444'", "mount.base_mode"),
        ("mount.base_mode = '0o400'", "not an octal mode"),
        ("mount.base_mode = '+400'", "not an octal mode"),
        ("mount.base_mode = '888'", "not an octal mode"),
        ("mount.base_mode = '77777777777777'", "not an octal mode"),
        ("mount.base_mode = 400", "octal mode in a string"),
        ("mount.path = '/'", "would hide the store"),
        ("mount.path = '/srv'", "would hide the store"),
        ("mount.path = '/srv/plyfs'", "would hide the store"),
        ("mount.path = 'mnt'", "relative"),
        ("runtime.dir = 'shm'", "relative"),
        ("log.level = 'loud'", "log.level: \"loud\" is no level"),
        ("log.format = 'xml'", "unknown variant `xml`"),
        ("store.path = ", "line 1"),
        ("security.seccomp = 'maybe'", "unknown variant `maybe`"),
        ("security.base_dirs = ['images']", "security.base_dirs: \"images\" is not an absolute path"),
        ("security.nbd_socket_dirs = ['nbd']", "security.nbd_socket_dirs: \"nbd\" is not an absolute path"),
        ("security.base_dirs = ['/images']\nsecurity.landlock = false", "landlock enforces them"),
        ("security.confine = true", "unknown field `confine`"),
        ("http.ca_file = 'ca.pem'", "http.ca_file: \"ca.pem\" is not an absolute path"),
        ("http.max_requests = 0", "http.max_requests: 0 is out of bounds; give 1 to 256"),
        ("http.max_requests = 257", "http.max_requests"),
        ("http.max_rate = '63K'", "http.max_rate: 63K is out of bounds"),
        ("http.connect_timeout = '99ms'", "http.connect_timeout: 99ms is out of bounds"),
        ("http.stall_timeout = '25h'", "http.stall_timeout"),
        ("http.min_rate = 0", "http.min_rate"),
        ("http.min_rate = '2G'", "http.min_rate"),
        ("http.allow = ['http://a']", "http.allow"),
        ("http.allow = ['10.0.0.0/33']", "http.allow"),
        ("http.stall_timeout = '1 week'", "is not a time"),
        ("http.user_agent = ''", "http.user_agent"),
        ("http.user_agent = \"a\\nb\"", "http.user_agent"),
        ("http.proxy = 'http://p'", "unknown field `proxy`"),
        ("[[http.credentials]]\nurl = 'ftp://h/'\nbearer_file = '/a'", "begin with http"),
        ("[[http.credentials]]\nurl = 'https://u:p@h/'\nbearer_file = '/a'", "no user, query"),
        ("[[http.credentials]]\nurl = 'https://'\nbearer_file = '/a'", "scheme, host"),
        ("[[http.credentials]]\nurl = 'https://h/'", "needs one of bearer_file"),
        ("[[http.credentials]]\nurl = 'https://h/'\nbearer_file = '/a'\nbasic_file = '/b'", "needs one of"),
        ("[[http.credentials]]\nurl = 'https://h/'\nbearer_file = 'a'", "not an absolute path"),
        ("[[http.credentials]]\nurl = 'https://h/'\ncommand = ['token']", "absolute path of a program"),
        ("[[http.credentials]]\nurl = 'https://h/'\ncommand = []", "absolute path of a program"),
        (
            "[[http.credentials]]\nurl = 'https://h/'\nbearer_file = '/a'\nrenew = '10ms'",
            "renew of https://h/",
        ),
        ("[[http.credentials]]\nbearer_file = '/a'", "missing field `url`"),
        ("[[http.credentials]]\nurl = 'https://h/'\ntoken = 'secret'", "unknown field `token`"),
        ("trace.idle_seconds = 0", "trace.idle_seconds: 0 is out of bounds; give 1 to 3600"),
        ("trace.longest_seconds = 86401", "trace.longest_seconds: 86401 is out of bounds"),
        ("trace.automatic = true", "unknown field `automatic`"),
        ("metrics.listen = 'localhost:9464'", "metrics.listen: \"localhost:9464\" is not valid"),
        ("metrics.listen = '127.0.0.1'", "give an IP address and a port"),
        ("metrics.listen = '127.0.0.1:0'", "is not valid"),
        ("metrics.listen = 9464", "invalid type"),
        ("notify.url = 'ftp://h/'", "notify.url: it is not valid"),
        ("notify.url = 'https://user:secret@h/'", "secrets go to [[http.credentials]]"),
        ("notify.url = 'https://h/?token=secret'", "notify.url: it is not valid"),
        ("notify.url = 'https://h/'\nsecurity.network = false", "set security.network = true"),
        ("notify.command = ['notify']", "notify.command: it does not begin with the absolute path"),
        ("notify.command = []", "notify.command: it does not begin with the absolute path"),
        ("encryption.key_dirs = ['keys']", "is not an absolute path"),
        ("encryption.key_command = ['key']", "encryption.key_command: it does not begin with"),
        ("encryption.key = 'secret'", "unknown field `key`"),
        ("http.clouds = [{}]", "missing field `name`"),
        ("http.clouds = [{name = 'a b'}]", "http.clouds: name \"a b\" is not valid"),
        ("http.clouds = [{name = 'a'}, {name = 'a'}]", "http.clouds: a is there twice"),
        ("http.clouds = [{name = 'a', file = 'c.yaml'}]", "is not an absolute path"),
        ("http.clouds = [{name = 'a', locations = ['file']}]", "unknown variant `file`"),
        ("http.clouds = [{name = 'a', password = 'secret'}]", "unknown field `password`"),
        ("notify.token = 'secret'", "unknown field `token`"),
    ] {
        let message = refusal(toml);
        assert!(message.contains(part), "{toml}: {message}");
    }
}

#[test]
fn the_error_names_a_missing_file() {
    let error = Config::load(Some(Path::new("/nowhere/plyfs.toml")), with_store()).expect_err("missing");
    assert!(error.to_string().contains("/nowhere/plyfs.toml"), "{error}");
}

#[test]
fn the_whole_configuration_survives_json() {
    let mut config = Config::merge(file::File::default(), with_store()).expect("valid");
    config.http.max_rate = Some(1 << 20);
    config.http.connect_timeout = Duration::from_millis(1500);
    config.http.credentials = vec![CredentialConfig {
        url: "https://h/".into(),
        bearer_file: Some("/a".into()),
        basic_file: None,
        header_file: None,
        command: None,
        renew: Some(Duration::from_secs(5)),
    }];
    let json = serde_json::to_string(&config).expect("serialize");
    assert_eq!(serde_json::from_str::<Config>(&json).expect("deserialize"), config);
    let with_more = json.replacen('{', "{\"more\":1,", 1);
    // A supervisor of a newer version may send more keys. This worker ignores them.
    assert_eq!(serde_json::from_str::<Config>(&with_more).expect("deserialize"), config);
}

#[test]
fn paths_that_json_cannot_represent_are_refused() {
    use std::os::unix::ffi::OsStringExt;
    let store = PathBuf::from(std::ffi::OsString::from_vec(b"/srv/\xff".to_vec()));
    let flags = Overrides { store: Some(store), mount: Some("/mnt/plyfs".into()), ..Overrides::default() };
    let error = Config::load(None, flags).expect_err("not UTF-8");
    assert!(error.to_string().contains("store.path"), "{error}");
}

#[test]
fn log_formats_have_names() {
    for format in [LogFormat::Auto, LogFormat::Human, LogFormat::Json] {
        assert_eq!(LogFormat::from_name(format.name()), Some(format));
        assert_eq!(serde_json::to_value(format).expect("serialize"), format.name());
    }
    assert_eq!(LogFormat::from_name("xml"), None);
}

#[test]
fn the_host_is_read_from_proc() {
    assert_eq!(effective_uid("Name:\tx\nUid:\t1000\t0\t1000\t1000\n"), Some(0));
    assert_eq!(effective_uid("Uid:\t0\t33\t0\t0\n"), Some(33));
    assert_eq!(effective_uid("nothing"), None);
    assert_eq!(total_memory_in("MemTotal:       1024 kB\nMemFree: 1 kB\n"), Some(1 << 20));
    assert_eq!(total_memory_in("MemFree: 1 kB\n"), None);
}

#[test]
fn default_stores() {
    let store = |root, data: Option<&str>, home: Option<&str>| {
        default_store_for(root, data.map(Into::into), home.map(Into::into)).ok()
    };
    assert_eq!(store(true, Some("/data"), None), Some("/var/lib/plyfs".into()));
    assert_eq!(store(false, Some("/data"), Some("/home/a")), Some("/data/plyfs".into()));
    assert_eq!(store(false, Some("data"), Some("/home/a")), Some("/home/a/.local/share/plyfs".into()));
    assert_eq!(store(false, None, Some("/home/a")), Some("/home/a/.local/share/plyfs".into()));
    assert_eq!(store(false, Some(""), Some("")), None);
}
