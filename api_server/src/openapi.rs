//! The description of the API, made from the types and routes themselves. What is served is the copy in
//! the documentation: making it takes 2 MiB of a machine's memory.

use utoipa::OpenApi;

use crate::fault::FaultBody;
use crate::routes::{
    balloon, boot, cpu, drives, fork, info, machine, mmds, nets, observe, small, snapshot,
};

/// What is served, as OpenAPI 3.1: `docs/openapi.json`, which a test keeps equal.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Hull API",
        description = "A machine, configured, started and changed over a Unix socket. What \
                       Firecracker's API has is here under the same names.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    servers((url = "http://localhost")),
    components(schemas(FaultBody)),
    paths(
        info::instance,
        info::version,
        info::full,
        info::openapi,
        boot::get,
        boot::put,
        cpu::get,
        cpu::put,
        machine::get,
        machine::put,
        machine::patch,
        drives::list,
        drives::get,
        drives::put,
        drives::patch,
        nets::list,
        nets::get,
        nets::put,
        nets::patch,
        balloon::get,
        balloon::put,
        balloon::patch,
        balloon::statistics,
        balloon::patch_statistics,
        mmds::get,
        mmds::put,
        mmds::patch,
        mmds::config,
        mmds::put_config,
        observe::metrics,
        observe::put_metrics,
        observe::prometheus,
        observe::events,
        snapshot::create,
        snapshot::load,
        fork::fork,
        small::act,
        small::set_state,
        small::entropy,
        small::put_entropy,
        small::serial,
        small::put_serial,
        small::vsock,
        small::put_vsock,
        small::logger,
        small::put_logger,
    )
)]
struct Description;

/// The description, as indented JSON with a line's end.
pub fn description() -> String {
    let mut api = Description::openapi();
    for (path, item) in &mut api.paths.paths {
        let operations = [
            ("get", &mut item.get),
            ("put", &mut item.put),
            ("patch", &mut item.patch),
            ("post", &mut item.post),
        ];
        for (method, operation) in operations {
            let Some(operation) = operation else { continue };
            refused(&mut operation.responses.responses);
            // Functions of one name are in several modules; ids have to be unique.
            let words = path.split(|c: char| !c.is_ascii_alphanumeric()).filter(|w| !w.is_empty());
            let id: Vec<&str> = std::iter::once(method).chain(words).collect();
            operation.operation_id = Some(id.join("-"));
        }
    }
    let mut text = api.to_pretty_json().unwrap_or_default();
    text.push('\n');
    text
}

/// Every request may be refused, with a reason.
fn refused(
    responses: &mut std::collections::BTreeMap<
        String,
        utoipa::openapi::RefOr<utoipa::openapi::response::Response>,
    >,
) {
    use utoipa::openapi::{ContentBuilder, Ref, ResponseBuilder};
    for (status, what) in [
        ("400", "Not valid, or not possible now; nothing was changed"),
        ("413", "The body is too large"),
    ] {
        let body = ContentBuilder::new().schema(Some(Ref::from_schema_name("Error"))).build();
        let response =
            ResponseBuilder::new().description(what).content("application/json", body).build();
        responses.entry(status.to_owned()).or_insert_with(|| response.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_copy_in_the_documentation_is_equal() {
        let copy = include_str!("../../docs/openapi.json");
        if std::env::var_os("UPDATE").is_some() {
            let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/openapi.json");
            std::fs::write(path, description()).unwrap();
        }
        assert!(copy == description(), "run this test with UPDATE=1 and look at the difference");
    }

    #[test]
    fn every_route_is_described() {
        let api: serde_json::Value = serde_json::from_str(&description()).unwrap();
        let paths = api["paths"].as_object().unwrap();
        for line in include_str!("routes/mod.rs").lines().map(str::trim) {
            let Some(route) = line.strip_prefix(".route(\"") else { continue };
            let (path, handlers) = route.split_once('"').unwrap();
            if !handlers.contains("later") {
                assert!(paths.contains_key(path), "{path}");
            }
        }
    }
}
