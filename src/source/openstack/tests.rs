use reqwest::Url;
use serde_json::{Value, json};

use super::*;
use crate::format::record::{Digest, ImageFormat};

const ID: &str = "0f3b1c1e-7b0a-4f3e-9d63-0c6d6a5a1f10";

fn body(cloud: &Cloud) -> Value {
    serde_json::from_str(&cloud.request).expect("JSON")
}

fn refused(text: &str, name: &str) -> String {
    let why = find(text, None, name).expect_err(text);
    assert!(!why.contains("geheim"), "{why}");
    why
}

const PASSWORD: &str = "
clouds:
  prod:
    auth:
      auth_url: https://keystone.example.org:5000
      username: reader
      password: geheim
      project_name: images
      user_domain_name: Default
      project_domain_id: p1
    region_name: R1
    interface: internal
";

#[test]
fn a_password_becomes_a_token_request_with_the_scope_of_its_project() {
    let cloud = find(PASSWORD, None, "prod").unwrap();
    assert_eq!(cloud.tokens.as_str(), "https://keystone.example.org:5000/v3/auth/tokens");
    assert_eq!((cloud.region.as_deref(), &*cloud.interface), (Some("R1"), "internal"));
    let user = json!({ "name": "reader", "domain": { "name": "Default" }, "password": "geheim" });
    let expected = json!({ "auth": {
        "identity": { "methods": ["password"], "password": { "user": user } },
        "scope": { "project": { "name": "images", "domain": { "id": "p1" } } },
    }});
    assert_eq!(body(&cloud), expected);
    assert!(!format!("{cloud:?}").contains("geheim"));
}

#[test]
fn an_application_credential_has_no_scope_of_its_own() {
    let text = "
clouds:
  a:
    auth_type: v3applicationcredential
    auth: {auth_url: 'http://k/identity/v3/', application_credential_id: 17, application_credential_secret: geheim}
  b:
    auth_type: v3applicationcredential
    auth: {auth_url: 'http://k', application_credential_name: n, application_credential_secret: geheim, user_id: u}
";
    let cloud = find(text, None, "a").unwrap();
    assert_eq!(cloud.tokens.as_str(), "http://k/identity/v3/auth/tokens");
    let with = |credential: Value| {
        json!({ "auth": { "identity": {
            "methods": ["application_credential"], "application_credential": credential,
        }}})
    };
    assert_eq!(body(&cloud), with(json!({ "id": "17", "secret": "geheim" })));
    let named = with(json!({ "name": "n", "secret": "geheim", "user": { "id": "u" } }));
    assert_eq!(body(&find(text, None, "b").unwrap()), named);
}

#[test]
fn a_system_and_a_domain_are_scopes_too_and_domains_have_a_default() {
    let of = |scope: &str| {
        let text = format!(
            "clouds: {{c: {{auth: {{auth_url: 'http://k', username: u, password: geheim, {scope}}}}}}}"
        );
        body(&find(&text, None, "c").unwrap())["auth"].clone()
    };
    assert_eq!(of("system_scope: all")["scope"], json!({ "system": { "all": true } }));
    assert_eq!(of("domain_name: d")["scope"], json!({ "domain": { "name": "d" } }));
    let both = of("project_name: 2024, default_domain: dd");
    assert_eq!(both["scope"]["project"], json!({ "name": "2024", "domain": { "id": "dd" } }));
    assert_eq!(both["identity"]["password"]["user"]["domain"], json!({ "id": "dd" }));
    assert_eq!(of("project_name: p")["scope"]["project"]["domain"], json!({ "id": "default" }));
}

#[test]
fn secrets_may_be_in_secure_yaml() {
    let clouds = "clouds: {c: {auth: {auth_url: 'http://k', username: u, project_id: p}}}";
    assert!(refused(clouds, "c").contains("no password"));
    let secure = "clouds: {c: {auth: {password: geheim}}}";
    let cloud = find(clouds, Some(secure), "c").unwrap();
    assert_eq!(body(&cloud)["auth"]["identity"]["password"]["user"]["password"], "geheim");
    assert!(find(clouds, Some("other: 1"), "c").is_err());
}

#[test]
fn what_is_wrong_with_a_cloud_is_said_without_its_secrets() {
    let cloud = |text: &str| format!("clouds: {{c: {text}}}");
    let auth = "username: u, password: geheim, project_id: p";
    for (text, part) in [
        ("clouds: [".into(), "clouds.yaml is not YAML at line"),
        ("a: geheim: b".into(), "clouds.yaml is not YAML at line 1"),
        ("- geheim".into(), "clouds.yaml is no map"),
        ("other: 1".into(), "no section clouds"),
        ("clouds: geheim".into(), "clouds of clouds.yaml is no map"),
        ("clouds: {a: {}, b: {}}".into(), "no cloud c; it has: a, b"),
        (cloud("geheim"), "cloud c of clouds.yaml is no map"),
        (cloud("{}"), "no map auth"),
        (cloud("{auth: {}}"), "no auth_url"),
        (cloud("{profile: vendor}"), "profile names settings"),
        (cloud(&format!("{{verify: false, auth: {{auth_url: 'https://k', {auth}}}}}")), "verify is false"),
        (cloud(&format!("{{auth: {{auth_url: 'https://k/v2.0', {auth}}}}}")), "version 2.0"),
        (cloud(&format!("{{auth: {{auth_url: 'ftp://k', {auth}}}}}")), "no plain http or https URL"),
        (
            cloud(&format!("{{auth: {{auth_url: 'https://u:geheim@k', {auth}}}}}")),
            "no plain http or https URL",
        ),
        (
            cloud(&format!("{{auth_type: v3totp, auth: {{auth_url: 'https://k', {auth}}}}}")),
            "auth_type is v3totp",
        ),
        (
            cloud(&format!("{{interface: secret, auth: {{auth_url: 'https://k', {auth}}}}}")),
            "interface is none",
        ),
        (cloud("{auth: {auth_url: 'https://k', username: u, password: geheim}}"), "names no project"),
        (cloud("{auth: {auth_url: 'https://k', password: geheim}}"), "neither username nor user_id"),
        (cloud("{auth: {auth_url: 'https://k', username: u, password: [geheim]}}"), "password is no text"),
        (
            cloud("{auth_type: v3applicationcredential, auth: {auth_url: 'https://k'}}"),
            "no application_credential_secret",
        ),
    ] {
        let why = refused(&text, "c");
        assert!(why.contains(part), "{text}: {why}");
    }
}

fn answer(catalog: Value) -> Vec<u8> {
    json!({ "token": {
        "issued_at": "2026-11-30T14:00:00.000000Z",
        "expires_at": "2026-11-30T15:00:00.000000Z",
        "catalog": catalog,
    }})
    .to_string()
    .into_bytes()
}

fn endpoint(interface: &str, region: &str, url: &str) -> Value {
    json!({ "interface": interface, "region": region, "region_id": region, "url": url, "id": "x" })
}

fn image(endpoints: &[Value]) -> Value {
    json!([{ "type": "image", "name": "glance", "endpoints": endpoints }])
}

fn session(yaml: &str, catalog: Value, inside: bool) -> Session {
    let cloud = find(yaml, None, "prod").unwrap();
    Session::of_answer(&cloud, "token-1", &answer(catalog), inside).unwrap()
}

#[test]
fn the_catalog_says_where_glance_is_by_interface_and_region() {
    let all = image(&[
        endpoint("public", "R1", "https://public:9292"),
        endpoint("internal", "R2", "https://other:9292"),
        endpoint("internal", "R1", "https://glance.internal:9292/"),
    ]);
    let session = session(PASSWORD, all, true);
    assert_eq!(session.life.as_secs(), 3600);
    let expected = Endpoint { url: "https://glance.internal:9292".into(), anywhere: true };
    assert_eq!(session.image, Ok(expected));
    assert!(session.object_store.as_ref().unwrap_err().contains("no service object-store"));
    assert!(!format!("{session:?}").contains("token-1"));
}

#[test]
fn an_endpoint_that_is_not_certain_is_refused_with_what_the_catalog_has() {
    let of = |yaml: &str, endpoints: &[Value]| session(yaml, image(endpoints), false).image.clone();
    let two = [endpoint("internal", "A", "https://a"), endpoint("internal", "B", "https://b")];
    let no_region = PASSWORD.replace("    region_name: R1\n", "");
    let why = of(&no_region, &two).unwrap_err();
    assert!(why.contains("several regions (A, B); set region_name"), "{why}");
    let why = of(PASSWORD, &two).unwrap_err();
    assert!(why.contains("in region R1; it has A, B"), "{why}");
    let why = of(PASSWORD, &[endpoint("public", "R1", "https://a")]).unwrap_err();
    assert!(why.contains("no service image with the interface internal"), "{why}");
    // A token that was got by https is not sent by http.
    let why = of(PASSWORD, &[endpoint("internal", "R1", "http://a")]).unwrap_err();
    assert!(why.contains("http and keystone is https"), "{why}");
    for bad in ["file:///etc/passwd", "glance", "https://user:pass@h/", "https://h/?x=1"] {
        assert!(of(PASSWORD, &[endpoint("internal", "R1", bad)]).is_err(), "{bad}");
    }
}

#[test]
fn the_operator_may_name_the_endpoint_and_then_its_address_is_not_judged() {
    let named = PASSWORD
        .replace("    region_name", "    image_endpoint_override: https://127.0.0.1:9292\n    region_name");
    let expected = Endpoint { url: "https://127.0.0.1:9292".into(), anywhere: true };
    assert_eq!(session(&named, json!([]), false).image, Ok(expected));
    let of_catalog = image(&[endpoint("internal", "R1", "https://127.0.0.1:9292")]);
    assert!(!session(PASSWORD, of_catalog, false).image.clone().unwrap().anywhere);
}

#[test]
fn an_answer_that_is_no_token_is_refused_without_its_text() {
    let cloud = find(PASSWORD, None, "prod").unwrap();
    let ended = json!({ "token": {
        "issued_at": "2026-11-30T14:00:00Z", "expires_at": "2026-11-30T13:00:00Z" } });
    for body in [b"<html>geheim".to_vec(), b"{}".to_vec(), ended.to_string().into_bytes()] {
        let why = Session::of_answer(&cloud, "t", &body, false).unwrap_err();
        assert!(!why.contains("geheim") && why.contains("keystone"), "{why}");
    }
    assert!(Session::of_answer(&cloud, "", &answer(json!([])), false).is_err());
}

fn record(changes: Value) -> ImageRecord {
    let mut all = json!({
        "id": ID, "name": "debian", "status": "active", "size": 4096, "os_hash_algo": "sha512",
        "os_hash_value": "ab".repeat(64), "checksum": "cd".repeat(16), "disk_format": "qcow2",
        "container_format": "bare", "visibility": "private", "tags": [], "owner_specified.x": "y",
    });
    for (key, value) in changes.as_object().unwrap() {
        all[key] = value.clone();
    }
    ImageRecord::parse(all.to_string().as_bytes()).unwrap()
}

#[test]
fn a_record_states_format_and_digest() {
    let active = record(json!({}));
    assert_eq!(active.format(), Ok(ImageFormat::Qcow2));
    assert_eq!(active.digest(), Some(Digest::Sha512([0xab; 64])));
    assert_eq!(active.unreadable(), None);
    assert_eq!(record(json!({ "disk_format": "iso" })).format(), Ok(ImageFormat::Raw));
    let sha256 = record(json!({ "os_hash_algo": "sha256", "os_hash_value": "01".repeat(32) }));
    assert_eq!(sha256.digest(), Some(Digest::Sha256([1; 32])));
    for other in [
        json!({ "os_hash_algo": "sha384" }),
        json!({ "os_hash_value": null }),
        json!({ "os_hash_value": "zz".repeat(64) }),
        json!({ "os_hash_value": "ab" }),
    ] {
        assert_eq!(record(other).digest(), None);
    }
    assert!(ImageRecord::parse(b"{\"id\": 1}").is_err() && ImageRecord::parse(b"<html>").is_err());
}

#[test]
fn an_image_that_is_not_active_is_named_in_glances_own_word() {
    for status in
        ["queued", "saving", "uploading", "importing", "deactivated", "deleted", "pending_delete", "killed"]
    {
        let why = record(json!({ "status": status })).unreadable().expect(status);
        assert!(why.contains(&format!("Glance says that the image is {status}: ")), "{why}");
    }
    let why = record(json!({ "status": "new\nword" })).unreadable().unwrap();
    assert!(!why.contains('\n'), "{why}");
}

#[test]
fn formats_that_plyfs_cannot_read_are_refused_and_never_guessed() {
    for (changes, part) in [
        (json!({ "disk_format": "vhdx" }), "disk_format is vhdx"),
        (json!({ "disk_format": null }), "no disk_format"),
        (json!({ "container_format": "ova" }), "container_format is ova"),
        (json!({ "container_format": null }), "no container_format"),
    ] {
        let why = record(changes).format().unwrap_err();
        assert!(why.contains(part), "{why}");
    }
}

#[test]
fn the_places_of_an_image_are_each_named_once_with_the_direct_one_first() {
    let all = record(json!({
        "direct_url": "http://b/2",
        "locations": [{ "url": "http://a/1", "metadata": {} }, { "url": "http://b/2", "metadata": {} }],
    }));
    assert_eq!(all.places(), ["http://b/2", "http://a/1"]);
    assert!(record(json!({})).places().is_empty());
}

#[test]
fn a_name_must_be_of_one_image() {
    let list = |count: usize| {
        let one = json!({ "id": ID, "status": "active", "size": 1 });
        let all = json!({ "images": vec![one; count], "schema": "/v2/schemas/images" });
        Matches::parse(all.to_string().as_bytes()).unwrap()
    };
    assert_eq!(list(1).only("debian").unwrap().id, ID);
    assert!(list(0).only("debian").unwrap_err().contains("no image debian that this project may see"));
    let why = list(5).only("debian").unwrap_err();
    assert!(why.contains("5 images debian; give the ID of one") && why.ends_with("..."), "{why}");
    assert!(Matches::parse(b"[]").is_err());
}

#[test]
fn places_of_images_are_read_as_the_operator_writes_them() {
    let at = |url: &str| ImagePlace { glance: Whereabouts::At(url.into()), image: ID.into() };
    for (text, expected) in [
        (format!("glance://h/{ID}"), at("https://h")),
        (format!("GLANCE://h:9292/{}", ID.to_uppercase()), at("https://h:9292")),
        (format!("glance://h/image/{ID}"), at("https://h/image")),
        (format!("glance://h/image/v2/images/{ID}"), at("https://h/image")),
        (format!("glance+http://h:9292/v2/images/{ID}/"), at("http://h:9292")),
    ] {
        let place = ImagePlace::parse(&text).unwrap().unwrap_or_else(|why| panic!("{text}: {why}"));
        assert_eq!(place, expected, "{text}");
        assert_eq!(ImagePlace::parse(&place.url_of(ID)).unwrap().as_ref(), Ok(&place));
    }
    let named = ImagePlace::parse("glance+cloud://prod/Debian%2012").unwrap().unwrap();
    assert_eq!(named, ImagePlace { glance: Whereabouts::Of("prod".into()), image: "Debian 12".into() });
    assert!(!named.is_by_id());
    assert_eq!(named.url_of(ID), format!("glance+cloud://prod/{ID}"));
    for wrong in [
        "glance://h/debian",
        "glance:///x",
        &format!("glance://u:p@h/{ID}"),
        &format!("glance://h/{ID}?a=b"),
        "glance+cloud:///a",
        "glance+cloud://a b/c",
        "glance+cloud://prod/",
        "glance+cloud://prod/a?b",
    ] {
        assert!(ImagePlace::parse(wrong).unwrap().is_err(), "{wrong}");
    }
    assert!(ImagePlace::parse("https://h/a").is_none() && ImagePlace::parse("/a").is_none());
}

#[test]
fn places_of_objects_are_read_as_the_operator_writes_them() {
    let place = ObjectPlace::parse("swift://prod/images/a/b.raw").unwrap().unwrap();
    assert_eq!(place, ObjectPlace { cloud: "prod".into(), path: "images/a/b.raw".into() });
    // A URL parser takes a backslash for a slash, and drops tabs; a server may decode %2f.
    for wrong in [
        "swift://prod/images",
        "swift://prod/images/",
        "swift:///a/b",
        "swift://p/a/../b",
        "swift://p/a/b?c",
        "swift://p/%2e%2e/b",
        "swift://p/a/.%2E/b",
        "swift://p/a/%2e/b",
        "swift://p/a/..%2f..%2Fb",
        "swift://p/a/..%5cb",
        "swift://p/a/..\\..\\b",
        "swift://p/a/.\t./b",
        "swift://p/a/b\n",
    ] {
        assert!(ObjectPlace::parse(wrong).unwrap().is_err(), "{wrong:?}");
    }
    let odd = ObjectPlace::parse("swift://prod/images/..a/b..%2fc").unwrap();
    assert_eq!(odd, Ok(ObjectPlace { cloud: "prod".into(), path: "images/..a/b..%2fc".into() }));
    assert!(ObjectPlace::parse("https://h/a").is_none());
}

/// A token is not shown, and a session survives the way from the credential helper.
#[test]
fn a_session_is_sent_as_text() {
    let sent = session(PASSWORD, image(&[endpoint("internal", "R1", "https://h")]), false);
    let text = serde_json::to_vec(&sent).unwrap();
    let got: Session = serde_json::from_slice(&text).unwrap();
    assert_eq!((&*got.token, got.life, &got.image), ("token-1", sent.life, &sent.image));
    assert!(Url::parse(&got.image.clone().unwrap().url).is_ok());
}

#[test]
fn an_endpoint_that_is_refused_is_shown_without_its_user_and_query() {
    let named = |url: &str| {
        let line = format!("    image_endpoint_override: {url}\n    region_name");
        PASSWORD.replace("    region_name", &line)
    };
    let bad = [
        "https://u:hidden@h/",
        "http://u:hidden@h/",
        "https://h/?key=hidden",
        "ftp://u:hidden@h/",
        "u:hidden@h",
    ];
    for bad in bad {
        let why = session(&named(bad), json!([]), false).image.clone().unwrap_err();
        assert!(!why.contains("hidden"), "{why}");
        let catalog = image(&[endpoint("internal", "R1", bad)]);
        let why = session(PASSWORD, catalog, false).image.clone().unwrap_err();
        assert!(!why.contains("hidden"), "{why}");
    }
}
