// A federation for trials: a workspace, an orchestrator and any number of silos, each with
// a resource group, a store, an identity and a compute of its own. See README.md.
//
//   az deployment sub create --location westeurope --template-file sandbox.bicep \
//     --parameters prefix=flchest silos='["hospital_a", "hospital_b"]' runner=OBJECT_ID
targetScope = 'subscription'

@description('Start of all names: lower-case letters and digits.')
@minLength(3)
@maxLength(10)
param prefix string

@description('Names as in silos.yaml, in lower case and with _ for spaces; 3 to 32 characters.')
@minLength(2)
param silos array

@description('Object id of the one who sends runs: az ad signed-in-user show --query id')
param runner string

@allowed(['User', 'Group', 'ServicePrincipal'])
param runnerType string = 'User'

param location string = deployment().location

@description('Size of every machine; a family with enough quota.')
param vmSize string = 'Standard_D4s_v5'

@description('How long a machine waits for the next round before it is given back.')
param idle string = 'PT15M'

@description('True: neither workspace nor stores can be reached from the internet.')
param private bool = false

@description('False: silos may read all of the orchestrator\'s store, not fl/models/ only.')
param readByPath bool = true

var parties = concat(['orchestrator'], silos)
var contributor = 'ba92f5b4-2d11-453d-a403-e96b0029c9fe' // Storage Blob Data Contributor
var reader = '2a2b9908-6ea1-4ae2-8e65-a410df84e7d1' // Storage Blob Data Reader
var outboxes = [for silo in silos: 'updates-${replace(silo, '_', '-')}']

// Reading and listing below fl/models/, in the syntax of role assignment conditions.
var blobs = 'Microsoft.Storage/storageAccounts/blobServices/containers/blobs'
var reading = 'ActionMatches{\'${blobs}/read\'}'
var listing = 'SubOperationMatches{\'Blob.List\'}'
var byPath = '(!(${reading} AND NOT ${listing})) OR (@Resource[${blobs}:path] StringStartsWith \'fl/models/\')'
var byPrefix = '(!(${reading} AND ${listing})) OR (@Request[${blobs}:prefix] StringStartsWith \'fl/models/\')'
var modelsOnly = '(${byPath}) AND (${byPrefix})'

resource groups 'Microsoft.Resources/resourceGroups@2024-03-01' = [
  for party in parties: {
    name: '${prefix}-${party}'
    location: location
  }
]

resource home 'Microsoft.Resources/resourceGroups@2024-03-01' = {
  name: '${prefix}-workspace'
  location: location
}

module workspace 'modules/workspace.bicep' = {
  name: 'workspace'
  scope: home
  params: {
    prefix: prefix
    location: location
    runner: runner
    runnerType: runnerType
    private: private
  }
}

module stores 'modules/store.bicep' = [
  for (party, i) in parties: {
    name: 'store-${party}'
    scope: groups[i]
    params: {
      name: '${prefix}${uniqueString(subscription().id, prefix, party)}'
      party: party
      location: location
      containers: i == 0 ? concat(['runs'], outboxes) : ['data']
      private: private
      workspacePrincipal: workspace.outputs.principal
    }
  }
]

// What a job may reach is what the identity of its compute may reach.

module own 'modules/rights.bicep' = [
  for (party, i) in parties: {
    name: 'own-${party}'
    scope: groups[i]
    params: {
      account: stores[i].outputs.name
      container: i == 0 ? 'runs' : 'data'
      principal: stores[i].outputs.principal
      role: contributor
    }
  }
]

module readModels 'modules/rights.bicep' = [
  for (silo, i) in silos: {
    name: 'models-${silo}'
    scope: groups[0]
    params: {
      account: stores[0].outputs.name
      container: 'runs'
      principal: stores[i + 1].outputs.principal
      role: reader
      condition: readByPath ? modelsOnly : ''
    }
  }
]

module release 'modules/rights.bicep' = [
  for (silo, i) in silos: {
    name: 'release-${silo}'
    scope: groups[0]
    params: {
      account: stores[0].outputs.name
      container: outboxes[i]
      principal: stores[i + 1].outputs.principal
      role: contributor
    }
  }
]

module gather 'modules/rights.bicep' = [
  for (silo, i) in silos: {
    name: 'gather-${silo}'
    scope: groups[0]
    params: {
      account: stores[0].outputs.name
      container: outboxes[i]
      principal: stores[0].outputs.principal
      role: reader
    }
  }
]

module download 'modules/rights.bicep' = {
  name: 'download'
  scope: groups[0]
  params: {
    account: stores[0].outputs.name
    container: 'runs'
    principal: runner
    principalType: runnerType
    role: reader
  }
}

module routes 'modules/routes.bicep' = if (private) {
  name: 'routes'
  scope: home
  params: {
    workspace: workspace.outputs.name
    stores: [for (party, i) in parties: stores[i].outputs.id]
  }
}

@batchSize(1) // one change of the workspace at a time
module computes 'modules/compute.bicep' = [
  for (party, i) in parties: {
    name: 'compute-${party}'
    scope: home
    params: {
      workspace: workspace.outputs.name
      name: replace(party, '_', '-')
      identity: stores[i].outputs.identity
      location: location
      vmSize: vmSize
      idle: idle
      private: private
      registry: workspace.outputs.registry
      workspaceStore: workspace.outputs.storeName
      principal: stores[i].outputs.principal
    }
    dependsOn: [routes]
  }
]

module datastores 'modules/datastore.bicep' = [
  for (party, i) in parties: {
    name: 'datastore-${party}'
    scope: home
    params: {
      workspace: workspace.outputs.name
      name: party
      account: stores[i].outputs.name
      container: i == 0 ? 'runs' : 'data'
      storeGroup: '${prefix}-${party}'
    }
  }
]

module outboxDatastores 'modules/datastore.bicep' = [
  for (silo, i) in silos: {
    name: 'outbox-${silo}'
    scope: home
    params: {
      workspace: workspace.outputs.name
      name: 'updates_${silo}'
      account: stores[0].outputs.name
      container: outboxes[i]
      storeGroup: '${prefix}-orchestrator'
    }
  }
]

@description('For silos.yaml: give each silo its own name, and the folder of its data.')
output silosYaml array = [
  for silo in silos: '- {name: ${silo}, azure_ml: {compute: ${replace(silo, '_', '-')}, datastore: ${silo}, data: FOLDER, outbox: updates_${silo}}}'
]
output workspaceYaml string = '{subscription_id: ${subscription().subscriptionId}, resource_group: ${prefix}-workspace, name: ${workspace.outputs.name}}'
output workspaceId string = workspace.outputs.id
output workspaceStore string = workspace.outputs.store
output orchestratorStore string = stores[0].outputs.id
output registryId string = workspace.outputs.registryId
output registry string = workspace.outputs.registryAddress

@description('For who puts data there: a store and its id for each party.')
output storeNames array = [for (party, i) in parties: '${party}: ${stores[i].outputs.name}']
output storeIds array = [for (party, i) in parties: '${party}: ${stores[i].outputs.id}']
